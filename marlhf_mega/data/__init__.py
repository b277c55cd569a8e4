"""Data: tokenizers, files, datasets, resumable streams, microbatches, the built-in task."""
