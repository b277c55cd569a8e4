"""Hang and failure detection, preemption, stragglers, and fault injection for tests."""
