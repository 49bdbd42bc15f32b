"""One row of feedback: draft, critique, refinement, scores, by whichever critic."""
