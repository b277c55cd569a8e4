"""Ranks, groups and collectives: the only layer above platform that communicates."""

from marlhf_mega import platform

platform.prepare()  # before this package's modules import Megatron
