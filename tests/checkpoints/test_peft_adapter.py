"""Adapters to and from PEFT: the same logits on both sides; unsupported features are refused by
name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_decoders import (
    build,
    ground_truth,
    our_logits,
    random_factors,
    relative,
    their_logits,
    tokens_of,
)

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.huggingface import load_base
from jaxre.checkpoints.peft import base_name_of, load_adapter, save_adapter
from jaxre.config import LORA_TARGETS, Lora
from jaxre.errors import InputError
from jaxre.models.lora import scale_of

torch = ground_truth("torch")
peft = ground_truth("peft")

# The design's promise for f32. Measured: 2e-5 at most, with adapters that multiply the activations.
PARITY = 1e-4

# Rank, scaling and targets that a fault would confuse: rank unlike any size, alpha unlike the rank,
# one target, some, all.
SETTINGS = {
    "all projections": Lora(rank=5, alpha=12.0, dropout=0.1),
    "rank-stabilised": Lora(rank=3, alpha=4.0, dropout=0.0, rslora=True),
    "q and v": Lora(rank=4, alpha=6.5, dropout=0.05, targets=("q", "v")),
    "down alone": Lora(rank=1, alpha=3.0, targets=("down",)),
}


@pytest.fixture(params=SETTINGS)
def lora(request):
    return SETTINGS[request.param]


def transformers_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager"
    ).eval()


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """A folder we exported, to break."""
    architecture, _ = load_base(tiny_base)
    save_adapter(
        tmp_path / "adapter",
        architecture,
        Lora(rank=4),
        random_factors(architecture, Lora(rank=4)),
        str(tiny_base),
        tiny_base,
    )
    return tmp_path / "adapter"


def equal(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


# ---- ours in peft ---------------------------------------------------------------------------


@contextlib.contextmanager
def no_warning():
    """Fails on a warning from Python, or from the loggers of transformers and peft, which may not
    propagate to the root logger.
    """
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [
        logging.getLogger(name) for name in (None, "transformers", "peft", "huggingface_hub")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # transformers warns of what peft calls, whatever the adapter.
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert not [record.getMessage() for record in records]


@pytest.mark.parametrize("name", ["transformers.modeling_utils", "peft.tuners", "jaxre"])
def test_warnings_of_every_logger_are_seen(name):
    with pytest.raises(AssertionError, match="seen"), no_warning():
        logging.getLogger(name).warning("seen")


def test_exported_adapter_loads_in_peft_without_a_warning_and_gives_our_logits(
    tiny_base, tmp_path, lora
):
    architecture, params = load_base(tiny_base)
    factors = random_factors(architecture, lora)
    save_adapter(tmp_path / "adapter", architecture, lora, factors, str(tiny_base), tiny_base)
    base = transformers_base(tiny_base)
    tokens = tokens_of(architecture.vocabulary, 2, 32)
    untouched = their_logits(base, tokens)
    with no_warning():
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    theirs = their_logits(model, tokens)
    assert (
        relative(
            our_logits(architecture, params, tokens, factors=factors, scale=scale_of(lora)), theirs
        )
        < PARITY
    )
    assert relative(untouched, theirs) > 0.02  # the adapter matters
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora) == (
        lora.rank,
        lora.alpha,
        lora.dropout,
        lora.rslora,
    )
    assert settings.task_type == "CAUSAL_LM" and settings.base_model_name_or_path == str(tiny_base)


def test_exported_folder_alone_is_enough_for_peft(adapter, tiny_base):
    """AutoPeftModel finds the base by its absolute path, and the tokenizer beside the adapter."""
    from transformers import AutoTokenizer

    with no_warning():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert model.num_parameters() > load_base(tiny_base)[1]["embed"].size
    assert AutoTokenizer.from_pretrained(adapter).encode(
        "Once upon a time", add_special_tokens=False
    ) == [403, 407, 261, 378]


def test_exported_tensors_are_separate_matrices_under_their_names(adapter):
    """[rank, in] and [out, rank] for each projection of each layer, f32 (peft#1579, vllm#6357)."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 2 and {value.dtype.name for value in tensors.values()} == {
        "float32"
    }
    module = "base_model.model.model.layers.{}.{}"
    assert tensors[module.format(0, "self_attn.q_proj.lora_A.weight")].shape == (4, 32)
    assert tensors[module.format(1, "self_attn.k_proj.lora_B.weight")].shape == (24, 4)
    assert tensors[module.format(2, "mlp.down_proj.lora_A.weight")].shape == (4, 48)
    assert tensors[module.format(2, "mlp.down_proj.lora_B.weight")].shape == (32, 4)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_adapter_comes_back_bit_identical(tmp_path, lora, layers, tiny_base):
    from jaxre.models.architecture import architecture_of

    fields = json.loads((tiny_base / "config.json").read_text())
    architecture = architecture_of({**fields, "num_hidden_layers": layers}, "test")
    factors = random_factors(architecture, lora)
    save_adapter(tmp_path / "adapter", architecture, lora, factors, "some/base", tiny_base)
    back_lora, back = load_adapter(tmp_path / "adapter", architecture)
    assert equal(back, factors) and {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {
        "float32"
    }
    assert back_lora == lora.model_copy(
        update={"targets": tuple(name for name in LORA_TARGETS if name in lora.targets)}
    )
    assert base_name_of(tmp_path / "adapter") == "some/base"


# ---- theirs in ours -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ("q", "v")),
        ({"target_modules": "all-linear"}, LORA_TARGETS),
        ({"target_modules": r".*\.self_attn\.(k|o)_proj"}, ("k", "o")),
        ({"target_modules": ["mlp.gate_proj", "down_proj"], "use_rslora": True}, ("gate", "down")),
        (
            {
                "target_modules": ["up_proj"],
                "rank_pattern": {"up_proj": 4},
                "alpha_pattern": {"up_proj": 10},
            },
            ("up",),
        ),
        ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, ("q",)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_made_by_peft_gives_peft_logits(tiny_base, tmp_path, settings, targets, dtype):
    base = transformers_base(tiny_base)
    config = peft.LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.1, task_type="CAUSAL_LM", **settings
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "lora_" in name
            ):  # values that bf16 holds exactly, so that storing in it loses nothing
                parameter.copy_((0.3 * torch.randn(parameter.shape)).to(torch.bfloat16))
    theirs = their_logits(model, tokens_of(512, 2, 32))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    if dtype == "bfloat16":
        import ml_dtypes

        save_file(
            {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(path).items()},
            path,
        )
    architecture, params = load_base(tiny_base)
    lora, factors = load_adapter(tmp_path / "adapter", architecture)
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (4, 10.0, 0.1, targets)
    assert (
        relative(
            our_logits(
                architecture, params, tokens_of(512, 2, 32), factors=factors, scale=scale_of(lora)
            ),
            theirs,
        )
        < PARITY
    )


# ---- merging --------------------------------------------------------------------------------


def merged_by_both(folder, tmp_path, lora, dtype):
    """(our merged tensors, peft's, the base's) under Hugging Face names, as torch tensors of
    `dtype`.
    """
    build(
        {
            "model_type": "qwen2",
            "tie_word_embeddings": True,
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
        },
        folder,
        dtype=dtype,
    )
    architecture, _ = load_base(folder)
    save_adapter(
        tmp_path / "adapter",
        architecture,
        lora,
        random_factors(architecture, lora),
        str(folder),
        folder,
    )
    merged = peft.PeftModel.from_pretrained(
        transformers_base(folder), tmp_path / "adapter"
    ).merge_and_unload()
    theirs = {
        name: value for name, value in merged.state_dict().items() if name != "lm_head.weight"
    }
    convert(tmp_path / "adapter", tmp_path / "merged", "hf", merge=True)
    ours = load_file(tmp_path / "merged/model.safetensors")
    assert ours.keys() == theirs.keys() and {value.dtype.name for value in ours.values()} == {dtype}
    return ours, theirs, load_file(folder / "model.safetensors")


def test_merging_into_float32_equals_merge_and_unload(tmp_path, lora):
    ours, theirs, base = merged_by_both(tmp_path / "base", tmp_path, lora, "float32")
    for name, value in ours.items():
        # A product of at most 5 terms, summed in another order.
        assert relative(value, theirs[name].numpy()) < 1e-6
    assert any(relative(value, base[name]) > 0.05 for name, value in ours.items())


def test_merging_into_bfloat16_equals_merge_and_unload(tmp_path, lora):
    """Both form the sum in f32 and round once: bit-equal. Rounding the product first would differ
    in a third of the elements.
    """
    ours, theirs, base = merged_by_both(tmp_path / "base", tmp_path, lora, "bfloat16")
    changed = 0
    for name, value in ours.items():
        one, other, start = (
            np.asarray(array, np.float32)
            for array in (value, theirs[name].float().numpy(), base[name])
        )
        changed += not np.array_equal(one, start)
        assert np.array_equal(one, other), (name, (one != other).mean())
    assert changed == 3 * len(lora.targets)


# ---- what is refused ------------------------------------------------------------------------


def refusal(folder, base) -> str:
    with pytest.raises(InputError) as error:
        load_adapter(folder, load_base(base)[0])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "all"}, 'bias="all"'),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"modules_to_save": ["embed_tokens"]}, 'modules_to_save=["embed_tokens"]'),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform=[0, 1]"),
        ({"layers_to_transform": 0, "use_dora": True}, "layers_to_transform=0, use_dora=true"),
        ({"rank_pattern": {"q_proj": 8}}, 'rank_pattern={"q_proj": 8}'),
        ({"alpha_pattern": {"q_proj": 8}}, 'alpha_pattern={"q_proj": 8}'),
        ({"rank_pattern": [1]}, "rank_pattern=[1]"),
        ({"alpha_pattern": "x"}, 'alpha_pattern="x"'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"some_future_feature": {"on": 1}}, "some_future_feature"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names lm_head"),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, "takes q of some layers only"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"r": 0}, "rank"),
        ({"r": "many"}, "rank"),
        ({"lora_alpha": -1}, "alpha"),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_features_we_do_not_have_are_refused_by_name(adapter, tiny_base, change, message):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message in refusal(adapter, tiny_base)


def test_adapter_with_dora_made_by_peft_is_refused(tiny_base, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(transformers_base(tiny_base), config).save_pretrained(tmp_path / "adapter")
    assert "use_dora=true" in refusal(tmp_path / "adapter", tiny_base)


def test_every_missing_misshapen_and_unknown_tensor_is_listed(adapter, tiny_base):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    module = "base_model.model.model.layers.{}.{}"
    del (
        tensors[module.format(0, "self_attn.q_proj.lora_A.weight")],
        tensors[module.format(2, "mlp.up_proj.lora_B.weight")],
    )
    misshapen = module.format(1, "self_attn.v_proj.lora_A.weight")
    tensors[misshapen] = np.ascontiguousarray(tensors[misshapen].T)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
    save_file(tensors, path)
    message = refusal(adapter, tiny_base)
    for problem in (
        "layers.0.self_attn.q_proj.lora_A.weight is missing",
        "layers.2.mlp.up_proj.lora_B.weight is missing",
        "layers.1.self_attn.v_proj.lora_A.weight has shape [32, 4], expected [4, 32]",
        "base_model.model.lm_head.lora_A.weight is not known",
    ):
        assert problem in message


def test_adapter_for_another_base_is_refused(adapter, tmp_path):
    build({"model_type": "llama", "hidden_size": 40, "num_hidden_layers": 2}, tmp_path / "other")
    message = refusal(adapter, tmp_path / "other")
    assert "the adapter belongs to another base" in message
    assert (
        "has shape [4, 32], expected [4, 40]" in message
        and "layers.2.mlp.up_proj.lora_A.weight is not known" in message
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(adapter, tiny_base, name):
    (adapter / name).unlink()
    assert f"{name}: no such file" in refusal(adapter, tiny_base)


def test_pickled_and_broken_files_are_refused(adapter, tiny_base, tmp_path):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "not a whole safetensors file" in refusal(adapter, tiny_base)
    for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.BIN"):
        path = path.rename(adapter / name)
        assert f"only pickled weights ({name})" in refusal(adapter, tiny_base)
    (adapter / "adapter_config.json").write_text("{")
    assert "not valid JSON" in refusal(adapter, tiny_base)


def test_refused_target_leaves_what_was_there(adapter, tiny_base):
    before = sorted(path.name for path in adapter.iterdir())
    architecture, _ = load_base(tiny_base)
    lora = Lora(rank=2)
    with pytest.raises(InputError, match="exists already"):
        save_adapter(
            adapter, architecture, lora, random_factors(architecture, lora), "x", tiny_base
        )
    assert sorted(path.name for path in adapter.iterdir()) == before
    save_adapter(
        adapter,
        architecture,
        lora,
        random_factors(architecture, lora),
        "x",
        tiny_base,
        replace=True,
    )
    assert load_adapter(adapter, architecture)[0].rank == 2
    shutil.rmtree(adapter)
