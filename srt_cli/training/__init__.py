"""How models are trained: sft.py and dpo.py tell the two stages, the other files what they share."""
