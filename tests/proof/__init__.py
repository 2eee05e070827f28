"""Tries to break the guarantee: a workload, the histories that its clients saw, their checker."""
