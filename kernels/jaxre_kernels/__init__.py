"""Kernels of packed-sequence LoRA training, usable without jaxre.

Each op is a folder with a plain XLA reference, which is always there, and the implementations for a device;
`implementation=` chooses one by name: "xla"; "pallas_tpu" for attention, LoRA projections (NF4 too) and linear cross-entropy, not run on
a TPU yet; "pallas_gpu" for attention on Hopper, "pallas_gpu_sm80" for it on Ampere and Ada, not run on a GPU yet.
"""
