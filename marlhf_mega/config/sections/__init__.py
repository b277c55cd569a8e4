"""Sections of the configuration: every key with its unit, its range and its default."""
