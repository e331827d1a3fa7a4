"""Data sets, corruptions and the order of evaluation."""
