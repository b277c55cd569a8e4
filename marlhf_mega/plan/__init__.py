"""Memory, time and checkpoints of a run, from its configuration alone. No torch."""
