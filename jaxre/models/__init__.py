"""Decoders, their weight table, LoRA."""
