"""Self-Refinement Tuning: improve a language model by language feedback (arXiv 2406.07168)."""

__version__ = "0.1.0"
