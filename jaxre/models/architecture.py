"""Architectures: the `config.json` of a decoder or an encoder, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxre.errors import InputError


@dataclass(frozen=True)
class Kind:
    """Defaults of a `model_type` for fields that its config.json omits, those of transformers'
    configuration classes.

    The config.json of SmolLM3-3B omits that its head is tied.
    """

    tied_head: bool = False
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    head_channels: int | None = None  # None: embedding / query heads
    unrotated_every: int | None = None  # every n-th layer does not rotate; None: all rotate
    activation: str = "silu"


# A gate is multiplied by the activation of the other product: SwiGLU or GeGLU (Shazeer 2020).
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
KINDS = {
    "llama": Kind(),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(qk_norm=True, head_channels=128),
    "smollm3": Kind(tied_head=True, rope_theta=2_000_000.0, unrotated_every=4),
    "gemma3_text": Kind(
        tied_head=True,
        rope_theta=1_000_000.0,
        qk_norm=True,
        head_channels=256,
        activation="gelu_pytorch_tanh",
    ),
}
GEMMA3 = "gemma3_text"
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_PATTERN = 6  # every sixth layer is global


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of rotary frequencies (Llama 3.1 model card; `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class LinearScaling:
    """Division of all rotary frequencies by a factor (`rope_type: linear`; Gemma 3 from 4B on)."""

    factor: float


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder.

    qk_norm: each head's query and key pass an RMSNorm before they rotate (Qwen3). rotary[l]: layer
    l rotates queries and keys (SmolLM3 leaves out every fourth layer).

    Gemma 3 only:
    sliding[l]: a token of layer l sees only the `window` positions that end with its own; such
    layers rotate with `local_rope_theta`, unscaled. unit_offset_norms: a norm multiplies by 1 + w,
    not by w. norms_after: attention and MLP are followed by a norm too. embedding_scale: factor on
    the embeddings that enter the first layer. score_scale: factor on scores in place of C^-1/2.
    """

    kind: str
    layers: int
    embedding: int
    query_heads: int
    kv_heads: int
    head_channels: int
    feed_forward: int
    vocabulary: int
    max_length: int
    rope_theta: float
    norm_epsilon: float
    tied_head: bool
    qkv_bias: bool
    qk_norm: bool
    rotary: tuple[bool, ...]
    rope_scaling: RopeScaling | LinearScaling | None = None
    initializer_range: float = 0.02
    activation: str = "silu"
    sliding: tuple[bool, ...] = ()
    window: int | None = None
    local_rope_theta: float | None = None
    unit_offset_norms: bool = False
    norms_after: bool = False
    embedding_scale: float | None = None
    score_scale: float | None = None

    @property
    def untied_head(self) -> bool:
        return not self.tied_head

    def layer_window(self, layer: int) -> int | None:
        """Number of positions visible to a token of a layer, its own included; None if all are."""
        return self.window if self.sliding and self.sliding[layer] else None

    def size(self, letters: str) -> int:
        """Length of a dimension named by letters: D, F, V, C, HC, KC."""
        return {
            "D": self.embedding,
            "F": self.feed_forward,
            "V": self.vocabulary,
            "C": self.head_channels,
            "HC": self.query_heads * self.head_channels,
            "KC": self.kv_heads * self.head_channels,
        }[letters]


ENCODERS = ("bert", "roberta")


@dataclass(frozen=True)
class EncoderArchitecture:
    """Sizes and switches of an encoder with its classification head.

    labels: of the head, in the order of its logits; () without a head. dense: the head has its tanh
    layer (BERT's pooler, the first layer of RoBERTa's head). position_offset: the token at
    position p of its example takes row p + offset of the position table. dropout: of hidden states
    while training; head_dropout: of the head.
    """

    tied_head: ClassVar[bool] = False  # there is no vocabulary head
    kind: str
    layers: int
    embedding: int
    heads: int
    feed_forward: int
    vocabulary: int
    position_rows: int
    position_offset: int
    token_types: int
    norm_epsilon: float
    labels: tuple[str, ...]
    dense: bool = True
    dropout: float = 0.1
    head_dropout: float = 0.1
    initializer_range: float = 0.02

    @property
    def max_length(self) -> int:
        return self.position_rows - self.position_offset

    def size(self, letters: str) -> int:
        """Length of a dimension named by letters: D, F, V, P rows of the position table, Y token
        types, N labels.
        """
        return {
            "D": self.embedding,
            "F": self.feed_forward,
            "V": self.vocabulary,
            "P": self.position_rows,
            "Y": self.token_types,
            "N": len(self.labels),
        }[letters]


def read_architecture(folder: Path) -> Architecture | EncoderArchitecture:
    """Reads the architecture of a folder in Hugging Face layout.

    Raises:
      InputError: config.json is missing, is not JSON, or describes no known decoder or encoder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a model folder has config.json, a tokenizer and *.safetensors"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold one JSON object; download the model again")
    return architecture_of(config, str(path))


def architecture_of(config: dict[str, Any], place: str) -> Architecture | EncoderArchitecture:
    """Builds the architecture from the fields of a config.json; errors name `place`.

    Raises:
      InputError: an unknown model_type, a missing field, an impossible size, or an unsupported
        feature.
    """
    if config.get("model_type") in ENCODERS:
        return _encoder_of(config, place)
    kind = KINDS.get(str(config.get("model_type")))
    if config.get("model_type") == "gemma3":
        raise InputError(
            f"{place}: model_type 'gemma3' reads images too, which is not supported; take a model"
            f" of text alone, {GEMMA3!r} (Gemma 3 270M or 1B)"
        )
    if kind is None:
        raise InputError(
            f"{place}: model_type {config.get('model_type')!r} is not known; known are"
            f" {', '.join((*KINDS, *ENCODERS))}"
        )
    _refuse_unsupported(config, kind, place)
    with _wrong_fields(place):
        layers, embedding, heads = (
            _size(config[field], field, place)
            for field in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        gemma3 = kind is KINDS[GEMMA3]
        rope = _gemma3_rope(config, place)[0] if gemma3 else _rope_of(config)
        # Llama defaults to the query heads; the defaults of other classes fit no model here.
        kv_field = config.get if kind is KINDS["llama"] else config.__getitem__
        architecture = Architecture(
            kind=config["model_type"],
            layers=layers,
            embedding=embedding,
            query_heads=heads,
            kv_heads=_size(kv_field("num_key_value_heads") or heads, "num_key_value_heads", place),
            head_channels=_size(
                config.get("head_dim") or kind.head_channels or embedding // heads,
                "head_dim",
                place,
            ),
            feed_forward=_size(config["intermediate_size"], "intermediate_size", place),
            vocabulary=_size(config["vocab_size"], "vocab_size", place),
            max_length=_size(config["max_position_embeddings"], "max_position_embeddings", place),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or kind.rope_theta),
            norm_epsilon=float(config["rms_norm_eps"]),
            tied_head=bool(config.get("tie_word_embeddings", kind.tied_head)),
            qkv_bias=kind.qkv_bias,
            qk_norm=kind.qk_norm,
            rotary=_rotary_layers(config, kind, layers, place),
            rope_scaling=_rope_scaling(config, rope, kind, place),
            initializer_range=float(config.get("initializer_range", 0.02)),
            activation=ACTIVATIONS[kind.activation],
            **(_gemma3_fields(config, layers, embedding, place) if gemma3 else {}),
        )
    if heads % architecture.kv_heads:
        raise InputError(
            f"{place}: num_attention_heads {heads} is not a multiple of num_key_value_heads"
            f" {architecture.kv_heads}; correct them"
        )
    if architecture.head_channels % 2:
        raise InputError(
            f"{place}: head_dim {architecture.head_channels} is odd; rotary positions turn pairs of"
            " channels"
        )
    return architecture


@contextmanager
def _wrong_fields(place: str) -> Iterator[None]:
    """Raises InputError for a field that the block misses or cannot convert."""
    try:
        yield
    except KeyError as error:
        raise InputError(
            f"{place}: the field {error.args[0]} is missing; download the model again, or add it"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{place}: a field has the wrong type ({error}); download the model again, or"
            " correct it"
        ) from None


def _refuse_unsupported(config: dict[str, Any], kind: Kind, place: str) -> None:
    gemma3 = kind is KINDS[GEMMA3]
    field = "hidden_activation" if gemma3 else "hidden_act"
    if config.get(field, kind.activation) != kind.activation:
        raise InputError(
            f"{place}: {field} {config[field]!r} is not supported; take a decoder with"
            f" {kind.activation}"
        )
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise InputError(
                f"{place}: {field} is set, which no supported decoder has; take another model"
            )
    if gemma3:
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(field) is not None:
                raise InputError(
                    f"{place}: {field} is set, which is not supported; take a Gemma 3 model"
                    " without it"
                )
        if config.get("use_bidirectional_attention"):
            raise InputError(
                f"{place}: use_bidirectional_attention is set, which is not supported; take a model"
                " that generates text"
            )
    elif config.get("use_sliding_window") or "sliding_attention" in (
        config.get("layer_types") or ()
    ):
        raise InputError(
            f"{place}: sliding-window attention is set, which is supported for {GEMMA3} alone; take"
            " another model"
        )
    ropes = (config, *(_gemma3_rope(config, place) if gemma3 else (_rope_of(config),)))
    if any((rope.get("partial_rotary_factor") or 1.0) != 1.0 for rope in ropes):
        raise InputError(
            f"{place}: partial_rotary_factor is set, which is not supported; take a model whose"
            " channels all rotate"
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{place}: the weights are quantised (quantization_config); give the unquantised model"
        )


def _size(value: Any, field: str, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{place}: {field} is {value!r}, not a positive whole number; correct it")
    return value


def _rotary_layers(config: dict[str, Any], kind: Kind, layers: int, place: str) -> tuple[bool, ...]:
    if kind.unrotated_every is None:
        return (True,) * layers
    rotates = config.get("no_rope_layers")  # 1 if a layer does rotate, despite the name
    if rotates is None:
        interval = _size(
            config.get("no_rope_layer_interval") or kind.unrotated_every,
            "no_rope_layer_interval",
            place,
        )
        rotates = [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(rotates) < layers:
        raise InputError(
            f"{place}: no_rope_layers lists {len(rotates)} of {layers} layers; list each"
        )
    return tuple(bool(flag) for flag in rotates[:layers])


def _rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rope fields, which take precedence over those of the top level, as in transformers."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _gemma3_rope(config: dict[str, Any], place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope fields of global and of sliding layers.

    `rope_scaling` takes precedence over the fields that transformers 5 writes for each kind of
    layer, and these over the older fields of the top level.

    Raises:
      InputError: fields that do not name their layers, or scaled sliding layers.
    """
    nested = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(nested, dict) or not set(nested) <= {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{place}: rope_parameters must hold full_attention and sliding_attention alone;"
            " correct it"
        )
    if "type" in scaling and "rope_type" not in scaling:  # transformers 5 reads it as no scaling
        raise InputError(f"{place}: rope_scaling.type is called rope_type in Gemma 3; rename it")
    sliding = nested.get("sliding_attention") or {}
    if sliding.get("rope_type", "default") != "default":
        raise InputError(
            f"{place}: rope scaling {sliding['rope_type']!r} of sliding layers is not supported;"
            " take a model that scales global layers alone"
        )
    return {**(nested.get("full_attention") or {}), **scaling}, sliding


def _gemma3_fields(
    config: dict[str, Any], layers: int, embedding: int, place: str
) -> dict[str, Any]:
    """Fields of an Architecture that only Gemma 3 has, with the defaults of transformers'
    Gemma3TextConfig.
    """
    types = config.get("layer_types")
    if types is None:
        pattern = _size(
            config.get("sliding_window_pattern", GEMMA3_PATTERN), "sliding_window_pattern", place
        )
        types = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(layers)
        ]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise InputError(
            f"{place}: layer_types must say sliding_attention or full_attention for each of the"
            f" {layers} layers; correct it"
        )
    sliding = tuple(kind == "sliding_attention" for kind in types)
    local = _gemma3_rope(config, place)[1]
    theta = local.get("rope_theta") or config.get("rope_local_base_freq") or GEMMA3_LOCAL_THETA
    return {
        "sliding": sliding,
        "window": (
            _size(config.get("sliding_window", 4096), "sliding_window", place)
            if any(sliding)
            else None
        ),
        "local_rope_theta": float(theta),
        "unit_offset_norms": True,
        "norms_after": True,
        "embedding_scale": embedding**0.5,
        "score_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def _rope_scaling(
    config: dict[str, Any], rope: dict[str, Any], kind: Kind, place: str
) -> RopeScaling | LinearScaling | None:
    scaling = rope.get("rope_type", rope.get("type", "default"))
    supported = "linear" if kind is KINDS[GEMMA3] else "llama3"
    if scaling == "default":
        return None
    if scaling != supported:
        raise InputError(
            f"{place}: rope scaling {scaling!r} is not supported; take a model with default or"
            f" {supported}"
        )
    if scaling == "linear":
        return LinearScaling(float(rope["factor"]))
    return RopeScaling(
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(
            config.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or config["max_position_embeddings"]
        ),
    )


def _encoder_of(config: dict[str, Any], place: str) -> EncoderArchitecture:
    """Builds the architecture from BERT's or RoBERTa's config.json.

    RoBERTa counts positions from the row after its pad token's.
    """
    for field, supported in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("problem_type", "single_label_classification"),
        ("is_decoder", False),
    ):
        if config.get(field) not in (None, supported):
            raise InputError(
                f"{place}: {field} {config[field]!r} is not supported; take an encoder with"
                f" {supported!r}"
            )
    kind = config["model_type"]
    with _wrong_fields(place):
        sizes = {
            name: _size(config[field], field, place)
            for name, field in (
                ("layers", "num_hidden_layers"),
                ("embedding", "hidden_size"),
                ("heads", "num_attention_heads"),
                ("feed_forward", "intermediate_size"),
                ("vocabulary", "vocab_size"),
                ("position_rows", "max_position_embeddings"),
                ("token_types", "type_vocab_size"),
            )
        }
        dropout = float(config.get("hidden_dropout_prob", 0.1))
        head_dropout = config.get("classifier_dropout")
        # transformers' default: two labels
        labels = config.get("id2label") or {
            number: f"LABEL_{number}" for number in range(int(config.get("num_labels", 2)))
        }
        architecture = EncoderArchitecture(
            kind=kind,
            **sizes,
            position_offset=int(config.get("pad_token_id", 1)) + 1 if kind == "roberta" else 0,
            norm_epsilon=float(config.get("layer_norm_eps", 1e-12)),
            labels=tuple(str(labels[number]) for number in sorted(labels, key=int)),
            dropout=dropout,
            head_dropout=dropout if head_dropout is None else float(head_dropout),
            initializer_range=float(config.get("initializer_range", 0.02)),
        )
    if architecture.embedding % architecture.heads:
        raise InputError(
            f"{place}: hidden_size {architecture.embedding} is not a multiple of"
            f" num_attention_heads {architecture.heads}; correct them"
        )
    for field, rate in (
        ("hidden_dropout_prob", architecture.dropout),
        ("classifier_dropout", architecture.head_dropout),
    ):
        if not 0 <= rate < 1:
            raise InputError(f"{place}: {field} is {rate}, not in [0, 1); correct it")
    if architecture.max_length < 1:
        raise InputError(
            f"{place}: max_position_embeddings {architecture.position_rows} leaves no position"
            " after the pad token's; correct it"
        )
    if len(set(architecture.labels)) < len(architecture.labels):
        raise InputError(f"{place}: id2label names a label twice; give each its own name")
    return architecture


def check_vocabulary(highest: int, architecture: Architecture | EncoderArchitecture) -> None:
    """Raises InputError if the highest token id is outside the model's vocabulary."""
    if highest >= architecture.vocabulary:
        raise InputError(
            f"the tokenizer gives token {highest}, but vocab_size of the model is"
            f" {architecture.vocabulary}; take the model with its own tokenizer (or correct"
            " model.architecture)"
        )
