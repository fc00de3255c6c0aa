"""Decoders and encoders, their weight tables, LoRA, sharding."""
