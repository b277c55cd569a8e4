"""Reward sources other than reward models: Python functions, code tests, HTTP servers."""
