"""One factory from a model configuration to the stage chunks that this rank holds."""

from marlhf_mega import platform

platform.prepare()  # before this package's modules import Megatron
