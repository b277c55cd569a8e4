"""Import and export Hugging Face weights of sharded models, with one slice in memory at a time."""
