"""`srt eval`: its options, the contest, and what it counts from saved files."""
