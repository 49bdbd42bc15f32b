"""The method, one file a stage, each read top to bottom."""
