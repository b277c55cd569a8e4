"""Checkpoints of a run, resharding, and Hugging Face import and export."""

from marlhf_mega import platform

platform.prepare()  # before this package's modules import Megatron
