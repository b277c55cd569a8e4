"""Data: tokenizers, files, data sets, resumable streams, microbatches, built-in tasks."""
