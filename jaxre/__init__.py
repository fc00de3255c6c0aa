"""jaxre: fine-tunes small language models for relation extraction in JAX/Flax."""

__version__ = "0.1.0"
