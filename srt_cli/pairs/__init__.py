"""From feedback to preference pairs: choosing, balancing, auditing, writing."""
