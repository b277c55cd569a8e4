"""Ranks, groups and collectives, and what is computed across them."""

from marlhf_mega import platform

platform.prepare()  # before this package's modules import Megatron
