"""Ranks, groups and collectives: the only layer above platform that communicates."""
