"""Kernels of packed-sequence LoRA training, usable without jaxre.

Each op is a folder (except `linear`) with a plain XLA reference, always available, and
implementations for particular devices; `implementation=` selects one by name: "xla"; "pallas_tpu"
for attention, LoRA projections (NF4 too) and linear cross-entropy on TPUs; "pallas_gpu" for the
same on Hopper GPUs; "pallas_gpu_sm80" for attention on Ampere and Ada. None of the three has run on
its device yet: unverified (`tools/hardware_check`).
"""
