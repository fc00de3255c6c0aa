"""The task: examples, labels, one reader per benchmark, prompts."""
