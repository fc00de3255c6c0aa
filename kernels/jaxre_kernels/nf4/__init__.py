"""4-bit NormalFloat weights (QLoRA, Dettmers et al. 2023), bit for bit those of bitsandbytes on
CPU: `nf4_linear(x, quantise(w))`.
"""

from jaxre_kernels.nf4.quantise import quantise
from jaxre_kernels.nf4.reference import dequantise, nf4_linear
from jaxre_kernels.nf4.tiles import NF4Tiles, dequantise_tiles, tiled
from jaxre_kernels.nf4.weight import NF4Weight, empty, forms

__all__ = [
    "NF4Tiles",
    "NF4Weight",
    "dequantise",
    "dequantise_tiles",
    "empty",
    "forms",
    "nf4_linear",
    "quantise",
    "tiled",
]
