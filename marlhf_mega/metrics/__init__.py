"""Metrics of a run: reduction over ranks, timing, rates, files, terminal."""
