"""Generation with a key/value cache on the very weights that are being trained."""
