"""Saved states of a run, and weights exchanged with Hugging Face."""
