"""Metrics of a run: reduction over ranks, files, terminal, timing, and the report."""
