"""Kernels of packed-sequence LoRA training, usable without jaxre.

Each op is a folder with a plain XLA reference, which is always there, and the implementations for a device;
`implementation=` chooses one by name: "xla", or "pallas_tpu" for attention and linear cross-entropy (not run on a TPU yet).
"""
