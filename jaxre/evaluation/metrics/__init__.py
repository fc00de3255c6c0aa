"""Scores, significance tests, error strata and scale regression."""
