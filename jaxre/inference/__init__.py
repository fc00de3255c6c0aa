"""Label scoring and greedy decoding."""
