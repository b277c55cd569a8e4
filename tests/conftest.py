import gc
import os
import signal
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).parents[1]

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# What is imported and collected stays: to look for garbage in it is a third of the time it takes.
gc.disable()

# A shell that starts the tests in the background ignores Ctrl-C for all that they start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that tests start import this checkout's package and, as `tests.*`, these helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_collection_modifyitems(items):
    """Run long files first: at the end short ones keep all workers busy."""
    long = {
        item.path
        for item in items
        if item.path.parent.name in ("distributed", "e2e") or item.get_closest_marker("slow")
    }
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish():
    """Look for garbage again, but only in what tests make."""
    gc.freeze()
    gc.enable()
