"""Hugging Face weights straight into sharded models and back, one slice in memory at a time."""
