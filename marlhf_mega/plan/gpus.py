"""GPUs that can be planned for: memory and speed, from the vendor's data sheets."""

from dataclasses import dataclass

from marlhf_mega.config.limits import GIB
from marlhf_mega.config.load import ConfigError
from marlhf_mega.metrics.flops import PEAK_FLOPS


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU model."""

    name: str
    memory: int
    """Bytes that the driver gives to a program."""
    flops: float
    """Dense bfloat16 operations per second."""
    bandwidth: float
    """Bytes per second from its memory."""
    link: float
    """Bytes per second to a GPU of the same machine, one way."""
    has_fp8: bool


GPUS = {
    gpu.name.lower(): gpu
    for name, gib, bandwidth, link, fp8 in (
        ("A100-40", 39.4, 1.555e12, 300e9, False),
        ("A100", 79.2, 2.039e12, 300e9, False),
        ("H100", 79.6, 3.35e12, 450e9, True),
        ("H800", 79.6, 3.35e12, 200e9, True),
        ("H200", 139.8, 4.8e12, 450e9, True),
        ("B200", 178.0, 8.0e12, 900e9, True),
        ("L40S", 44.5, 0.864e12, 32e9, True),
    )
    for gpu in (
        Gpu(
            name=name,
            memory=int(gib * GIB),
            flops=PEAK_FLOPS[name.partition("-")[0]],
            bandwidth=bandwidth,
            link=link,
            has_fp8=fp8,
        ),
    )
}
_SAME = {"a100-80": "a100", "h100-80": "h100", "h200-141": "h200"}


def find_gpu(name: str) -> Gpu:
    """Find a GPU by name, ignoring case.

    Raises:
        ConfigError: the name is not known.
    """
    key = _SAME.get(name.lower(), name.lower())
    if key not in GPUS:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ConfigError(f"--gpu={name}: must be a known device. Use one of {known}.")
    return GPUS[key]
