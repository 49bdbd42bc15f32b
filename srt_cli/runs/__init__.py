"""Lines on disk, and the run around them."""
