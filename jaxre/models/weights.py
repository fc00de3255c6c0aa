"""The weight tables: one declaration per weight, read by import, export, initialisation, sharding
and LoRA.

Letters: L layers, D embedding, H query heads, K key/value heads, C head channels, F feed-forward,
V vocabulary, P rows of the position table, Y token types, N labels. `HC` is H x C, one dimension.

Our pytree: `{"embed", "norm", ["head"], "layers": {name: [L-1, ...]}, "last": {name: [...]}}`.
All layers but the last are stacked and scanned. The last has its own entry and is never a slice of
the stack: slicing the stack inside a step copies the whole base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxre.models.architecture import Architecture, EncoderArchitecture

AnyArchitecture = Architecture | EncoderArchitecture


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    dims: letters of each dimension of our array. axes: the mesh axis that shards each dimension.
    hf: the Hugging Face name, with `{layer}` for a weight of a layer. transpose: ours is [in, out],
    where Hugging Face stores a linear map as [out, in]. lora: input group of a projection that LoRA
    may target; projections of a group read the same input. switch: the field of Architecture that
    turns the weight on.
    """

    name: str
    dims: tuple[str, ...]
    hf: str
    axes: tuple[str | None, ...]
    transpose: bool = False
    initial: str = "normal"
    lora: str | None = None
    switch: str | None = None

    def shape(self, architecture: AnyArchitecture) -> tuple[int, ...]:
        return tuple(architecture.size(letters) for letters in self.dims)

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.hf


def _projection(
    name: str, dims: str, module: str, axes: tuple[str | None, ...], group: str
) -> Weight:
    return Weight(
        name,
        tuple(dims.split()),
        f"model.layers.{{layer}}.{module}.weight",
        axes,
        transpose=True,
        lora=group,
    )


def _bias(name: str, dim: str, module: str) -> Weight:
    return Weight(
        name,
        (dim,),
        f"model.layers.{{layer}}.{module}.bias",
        ("tensor",),
        initial="zeros",
        switch="qkv_bias",
    )


def _norm(
    name: str, module: str, dim: str = "D", switch: str | None = None, initial: str = "ones"
) -> Weight:
    return Weight(
        name,
        (dim,),
        f"model.layers.{{layer}}.{module}.weight",
        (None,),
        initial=initial,
        switch=switch,
    )


# Llama's layout. Qwen2 adds a bias to q, k and v; Qwen3 adds a norm to each head's q and k.
DECODER = (
    Weight("embed", ("V", "D"), "model.embed_tokens.weight", ("tensor", "fsdp")),
    Weight("norm", ("D",), "model.norm.weight", (None,), initial="ones"),
    Weight("head", ("V", "D"), "lm_head.weight", ("tensor", "fsdp"), switch="untied_head"),
    _norm("attention_norm", "input_layernorm"),
    _projection("q", "D HC", "self_attn.q_proj", ("fsdp", "tensor"), "qkv"),
    _projection("k", "D KC", "self_attn.k_proj", ("fsdp", "tensor"), "qkv"),
    _projection("v", "D KC", "self_attn.v_proj", ("fsdp", "tensor"), "qkv"),
    _bias("q_bias", "HC", "self_attn.q_proj"),
    _bias("k_bias", "KC", "self_attn.k_proj"),
    _bias("v_bias", "KC", "self_attn.v_proj"),
    _norm("q_norm", "self_attn.q_norm", "C", "qk_norm"),
    _norm("k_norm", "self_attn.k_norm", "C", "qk_norm"),
    _projection("o", "HC D", "self_attn.o_proj", ("tensor", "fsdp"), "o"),
    _norm("mlp_norm", "post_attention_layernorm"),
    _projection("gate", "D F", "mlp.gate_proj", ("fsdp", "tensor"), "gate_up"),
    _projection("up", "D F", "mlp.up_proj", ("fsdp", "tensor"), "gate_up"),
    _projection("down", "F D", "mlp.down_proj", ("tensor", "fsdp"), "down"),
)


def _encoder(prefix: str, dense: str, classifier: str) -> tuple[Weight, ...]:
    """BERT's and RoBERTa's layout: every map has a bias, every norm a weight and a bias; the caller
    names the modules of the head.
    """

    def linear(
        name: str, dims: str, module: str, axes: tuple[str | None, ...], switch: str | None = None
    ) -> Iterator[Weight]:
        weight, bias = tuple(dims.split()), axes[1]
        yield Weight(name, weight, f"{module}.weight", axes, transpose=True, switch=switch)
        yield Weight(
            f"{name}_bias", weight[1:], f"{module}.bias", (bias,), initial="zeros", switch=switch
        )

    def norm(name: str, module: str) -> Iterator[Weight]:
        yield Weight(name, ("D",), f"{module}.LayerNorm.weight", (None,), initial="ones")
        yield Weight(f"{name}_bias", ("D",), f"{module}.LayerNorm.bias", (None,), initial="zeros")

    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{layer}}"
    return (
        Weight("embed", ("V", "D"), f"{embeddings}.word_embeddings.weight", ("tensor", "fsdp")),
        Weight("positions", ("P", "D"), f"{embeddings}.position_embeddings.weight", (None, "fsdp")),
        Weight("types", ("Y", "D"), f"{embeddings}.token_type_embeddings.weight", (None, "fsdp")),
        *norm("embed_norm", embeddings),
        *linear("q", "D D", f"{layer}.attention.self.query", ("fsdp", "tensor")),
        *linear("k", "D D", f"{layer}.attention.self.key", ("fsdp", "tensor")),
        *linear("v", "D D", f"{layer}.attention.self.value", ("fsdp", "tensor")),
        *linear("o", "D D", f"{layer}.attention.output.dense", ("tensor", "fsdp")),
        *norm("attention_norm", f"{layer}.attention.output"),
        *linear("up", "D F", f"{layer}.intermediate.dense", ("fsdp", "tensor")),
        *linear("down", "F D", f"{layer}.output.dense", ("tensor", "fsdp")),
        *norm("mlp_norm", f"{layer}.output"),
        *linear("dense", "D D", dense, ("fsdp", "tensor"), "dense"),
        *linear("classifier", "D N", classifier, ("fsdp", None), "labels"),
    )


def _gemma3() -> tuple[Weight, ...]:
    """Llama's layout with other norms: their weights start at 0, as 1 is added to them, and
    attention and MLP have a norm before and after (`post_attention_layernorm` follows attention).
    """
    norms = {
        "attention_norm": ("input_layernorm", "D"),
        "q_norm": ("self_attn.q_norm", "C"),
        "k_norm": ("self_attn.k_norm", "C"),
        "attention_out_norm": ("post_attention_layernorm", "D"),
        "mlp_norm": ("pre_feedforward_layernorm", "D"),
        "mlp_out_norm": ("post_feedforward_layernorm", "D"),
    }
    return (
        *(
            replace(weight, initial="zeros") if weight.name == "norm" else weight
            for weight in DECODER
            if weight.name not in norms
        ),
        *(_norm(name, module, dim, initial="zeros") for name, (module, dim) in norms.items()),
    )


GEMMA = {"gemma3_text": _gemma3()}
ENCODER = {
    "bert": _encoder("bert", "bert.pooler.dense", "classifier"),
    "roberta": _encoder("roberta", "classifier.dense", "classifier.out_proj"),
}


def table(architecture: AnyArchitecture) -> tuple[Weight, ...]:
    """The rows of this architecture."""
    rows = (GEMMA | ENCODER).get(architecture.kind, DECODER)
    return tuple(
        weight for weight in rows if weight.switch is None or getattr(architecture, weight.switch)
    )


def places(
    architecture: AnyArchitecture,
) -> Iterator[tuple[Weight, tuple[str, ...], tuple[int, ...], tuple[str | None, ...]]]:
    """Yields (row, path, shape, axes) of every array of our pytree; a stacked shape begins with
    L-1.
    """
    for weight in table(architecture):
        shape = weight.shape(architecture)
        if not weight.in_layer:
            yield weight, (weight.name,), shape, weight.axes
            continue
        yield (
            weight,
            ("layers", weight.name),
            (architecture.layers - 1, *shape),
            (None, *weight.axes),
        )
        yield weight, ("last", weight.name), shape, weight.axes


def tree_of(pairs: Iterator[tuple[tuple[str, ...], Any]]) -> dict:
    """Builds nested dicts from (path, value) pairs."""
    tree: dict = {}
    for path, value in pairs:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def parameter_count(architecture: AnyArchitecture) -> int:
    """Number of base parameters, a tied head counted once."""
    return sum(math.prod(shape) for _, _, shape, _ in places(architecture))
