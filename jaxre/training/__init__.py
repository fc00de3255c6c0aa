"""Training: the objective, the update step, the loop."""
