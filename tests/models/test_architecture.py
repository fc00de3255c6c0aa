"""A config.json is read as its model means it, or refused with the field's name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_decoders import ground_truth

from jaxre.errors import InputError
from jaxre.models.architecture import architecture_of, read_architecture
from jaxre.models.decoder import plain_frequencies, rotary_frequencies
from jaxre.models.weights import parameter_count

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}


def test_omitted_fields_have_the_defaults_of_the_model_type():
    """The published config.json of SmolLM3-3B omits that its head is tied."""
    families = [
        architecture_of({**LLAMA, "num_key_value_heads": 4, "model_type": kind}, "test")
        for kind in ("llama", "qwen2", "qwen3", "smollm3")
    ]
    assert [one.tied_head for one in families] == [False, False, False, True]
    assert [one.qkv_bias for one in families] == [False, True, False, False]
    assert [one.qk_norm for one in families] == [False, False, True, False]
    assert [one.head_channels for one in families] == [8, 8, 128, 8]
    assert [one.rope_theta for one in families] == [1e4, 1e4, 1e4, 2e6]
    *others, smollm3 = families
    assert smollm3.rotary == (True, True, True, False) and all(all(one.rotary) for one in others)


def test_heads_are_derived_where_not_given():
    architecture = architecture_of(LLAMA, "test")
    assert (architecture.kv_heads, architecture.head_channels) == (4, 8)
    given = architecture_of({**LLAMA, "num_key_value_heads": 2, "head_dim": 16}, "test")
    assert (given.kv_heads, given.head_channels, given.size("HC"), given.size("KC")) == (
        2,
        16,
        64,
        32,
    )


def test_rotary_layers_of_smollm3_mean_nothing_to_llama():
    assert all(architecture_of({**LLAMA, "no_rope_layers": [0, 0, 0, 0]}, "test").rotary)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {**LLAMA3, "rope_theta": 12345.0, "original_max_position_embeddings": 64}},
        {
            "rope_theta": 777.0,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 32,
        },
        {"rope_theta": 777.0, "rope_scaling": LLAMA3},
        {
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
        },
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rope_fields_are_read_as_in_transformers(kind, fields, tmp_path):
    """Old and new names together, and lengths that are given twice or not at all."""
    ground_truth("torch")
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**LLAMA, "model_type": kind, "num_key_value_heads": 4, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq.numpy()
    np.testing.assert_array_equal(rotary_frequencies(read_architecture(tmp_path)), theirs)


def test_key_heads_are_required_where_the_class_has_another_default():
    """Qwen2Config defaults to 32 for any model."""
    with pytest.raises(InputError, match="num_key_value_heads is missing"):
        architecture_of({**LLAMA, "model_type": "qwen2"}, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not known; known are llama, qwen2, qwen3, smollm3, gemma3_text",
        ),
        ({"model_type": None}, "model_type None is not known"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}},
            "partial_rotary_factor",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"vocab_size": 10.5}, "vocab_size is 10.5"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": "tiny"}, "wrong type"),
        ({"rms_norm_eps": None}, "wrong type"),
        (
            {"model_type": "smollm3", "num_key_value_heads": 4, "no_rope_layers": [1, 1]},
            "no_rope_layers lists 2 of 4 layers",
        ),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=r"^test: ") as error:
        architecture_of({**LLAMA, **change}, "test")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", sorted(set(LLAMA) - {"model_type"}))
def test_a_missing_field_is_named(field):
    with pytest.raises(InputError, match=f"the field {field} is missing"):
        architecture_of({key: value for key, value in LLAMA.items() if key != field}, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("{", "not valid JSON"), ("[]", "one JSON object")],
)
def test_a_broken_config_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_architecture(tmp_path)


def test_a_config_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_architecture(tmp_path) == architecture_of(LLAMA, "test")


# As google/gemma-3-270m-it and google/gemma-3-1b-it publish it, which transformers 4 wrote.
GEMMA3_270M = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
GEMMA3_1B = GEMMA3_270M | {
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "sliding_window_pattern": 6,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(GEMMA3_270M, 268_098_176), (GEMMA3_1B, 999_885_952)],
    ids=["270M", "1B"],
)
def test_gemma3_has_the_published_shapes(config, parameters):
    """The parameters that the hub counts in google/gemma-3-270m and google/gemma-3-1b-it."""
    architecture = architecture_of(config, "test")
    assert parameter_count(architecture) == parameters
    assert [layer for layer, sliding in enumerate(architecture.sliding, 1) if not sliding] == [
        layer for layer in range(1, architecture.layers + 1) if layer % 6 == 0
    ]
    assert (architecture.window, architecture.layer_window(0)) == (512, 512)
    assert architecture.layer_window(5) is None
    assert (architecture.rope_theta, architecture.local_rope_theta) == (1e6, 1e4)
    assert architecture.tied_head and architecture.qk_norm and architecture.score_scale == 1 / 16


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 61}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window_pattern": 2},
        {"_sliding_window_pattern": 2},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"rope_theta": None, "rope_local_base_freq": None},
        {"rope_scaling": LINEAR},
        {"rope_scaling": {**LINEAR, "rope_theta": 77.0}},
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            }
        },
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0},
            },
            "rope_scaling": LINEAR,
        },
    ],
)
def test_gemma3_fields_are_read_as_in_transformers(fields, tmp_path):
    """Reads config.json as published, as transformers 5 rewrites it, and with fields left out."""
    ground_truth("torch")
    from transformers import AutoConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    config = {**GEMMA3_270M, **SMALL, **fields}
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert [
        "sliding_attention" if sliding else "full_attention" for sliding in architecture.sliding
    ] == theirs.layer_types
    rotary = Gemma3RotaryEmbedding(theirs)
    for kind, ours in (
        ("full_attention", rotary_frequencies(architecture)),
        (
            "sliding_attention",
            plain_frequencies(architecture.local_rope_theta, architecture.head_channels),
        ),
    ):
        if kind in theirs.layer_types:
            frequencies = getattr(rotary, f"{kind}_inv_freq").numpy()
            # torch's own power is up to two units in the last place off in a channel or two.
            np.testing.assert_allclose(ours, frequencies, rtol=2.4e-7)
    assert architecture_of(json.loads(theirs.to_json_string()), "again") == architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' reads images too"),
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ({"layer_types": ["full_attention"]}, "layer_types must say"),
        ({"layer_types": ["chunked_attention"] * 18}, "layer_types must say"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters must hold"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope scaling 'linear' of sliding layers",
        ),
    ],
)
def test_an_unsupported_feature_of_gemma3_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=r"^test: ") as error:
        architecture_of({**GEMMA3_270M, **change}, "test")
    assert message in str(error.value) and "\n" not in str(error.value)
