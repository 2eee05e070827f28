"""The benchmark: what a write costs under arbiter and under what a user would pick instead."""
