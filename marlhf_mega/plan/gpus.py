"""Devices that can be planned for: memory and speed, from vendors' data sheets."""

from dataclasses import dataclass

from marlhf_mega.config.load import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device."""

    name: str
    memory: int
    """Bytes that a program can get from the driver."""
    flops: float
    """Dense bfloat16 operations per second."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to a GPU of the same machine, one way."""
    has_fp8: bool


GPUS = {
    gpu.name.lower(): gpu
    for name, gib, tera, bandwidth, link, fp8 in (
        ("A100-40", 39.4, 312, 1.555e12, 300e9, False),
        ("A100", 79.2, 312, 2.039e12, 300e9, False),
        ("H100", 79.6, 989, 3.35e12, 450e9, True),
        ("H800", 79.6, 989, 3.35e12, 200e9, True),
        ("H200", 139.8, 989, 4.8e12, 450e9, True),
        ("B200", 178.0, 2250, 8.0e12, 900e9, True),
        ("L40S", 44.5, 362, 0.864e12, 32e9, True),
    )
    for gpu in (
        Gpu(
            name=name,
            memory=int(gib * GIB),
            flops=tera * 1e12,
            bandwidth=bandwidth,
            link=link,
            has_fp8=fp8,
        ),
    )
}
_SAME = {"a100-80": "a100", "h100-80": "h100", "h200-141": "h200"}


def find_gpu(name: str) -> Gpu:
    """Look a device up by its name, in any case.

    Raises:
        ConfigError: it is not known.
    """
    key = _SAME.get(name.lower(), name.lower())
    if key not in GPUS:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ConfigError(f"--gpu={name}: must be a known device. Use one of {known}.")
    return GPUS[key]
