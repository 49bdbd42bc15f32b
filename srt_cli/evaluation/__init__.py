"""Comparing models: judging, counting, and whether a critic drifts."""
