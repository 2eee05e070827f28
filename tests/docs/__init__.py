"""Runs the blocks of README and docs/, compares what they show, draws the picture."""
