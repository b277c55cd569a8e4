"""What a run will need, from its configuration alone: memory, time, checkpoints. No torch."""
