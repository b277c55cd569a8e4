"""Saved states of a run, and weights exchanged with Hugging Face."""

from marlhf_mega import platform

platform.prepare()  # before this package's modules import Megatron
