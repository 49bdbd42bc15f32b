"""Many rows side by side, asked under one journal and one budget."""
