"""Start without collections of garbage: what a start loads stays, and is most of what there is."""

import gc

_paused = False


def pause_collections() -> None:
    """Collect nothing until `resume_collections`: a fifth of a rank's start goes into it.

    For a program; a script that imports the package keeps its own settings.
    """
    global _paused
    _paused = True
    gc.disable()


def resume_collections() -> None:
    """Collect again, if paused, what is made from now on: modules and data are never looked at."""
    global _paused
    if _paused:
        _paused = False
        gc.freeze()
        gc.enable()
