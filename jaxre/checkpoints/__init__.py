"""Weights in and out: Hugging Face folders, PEFT adapters, the Orbax store of a run."""
