"""Training: the objective, the update step, sharding, the loop."""
