"""Trying hard to break it: a workload, the histories that its clients saw, and their checker."""
