"""Generation with a key/value cache on the very weights that are being trained."""

from marlhf_mega import platform

platform.prepare()  # before this package's modules import Megatron
