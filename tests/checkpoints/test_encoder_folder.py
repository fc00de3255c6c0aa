"""Encoders in Hugging Face folders: all naming schemes of weights, with and without head,
bit-identical, faults listed.
"""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from refusals import refusal
from safetensors.numpy import load_file, save_file
from tiny_decoders import ground_truth, random_factors, relative
from tiny_encoders import (
    LABELS,
    SIZES,
    build,
    fields_of,
    minilm,
    our_logits,
    their_logits,
    tokens_of,
)
from tiny_runs import LORA

from jaxre.checkpoints.convert import convert, verification_table
from jaxre.checkpoints.huggingface import load_base, save_base
from jaxre.checkpoints.peft import save_adapter
from jaxre.checkpoints.source import open_model
from jaxre.models.architecture import architecture_of
from jaxre.models.encoder import for_task

torch = ground_truth("torch")
NAMES = ("bert, two token types", "roberta, positions from 2")


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    build(fields_of(request.param), folder)
    return folder


@pytest.fixture
def folder(family, tmp_path):
    """A copy to break."""
    return shutil.copytree(family, tmp_path / "model")


def rewrite(folder, change):
    """The folder's tensors as `change` (a function of the dict) gives them."""
    path = folder / "model.safetensors"
    save_file(
        {name: np.ascontiguousarray(value) for name, value in change(load_file(path)).items()}, path
    )


def equal(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


# ---- what works -----------------------------------------------------------------------------


def test_a_saved_folder_is_bit_identical(family, tmp_path):
    architecture, params = load_base(family)
    save_base(tmp_path / "out", architecture, params, family)
    ours, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(family / "model.safetensors"),
    )
    assert equal(ours, theirs)


def test_an_encoder_with_new_tokens_and_labels_loads_in_transformers_with_the_same_logits(
    family, tmp_path
):
    """Resized embeddings, a new head and its label names, as after training; nothing is missing or
    initialised anew.
    """
    from transformers import AutoModelForSequenceClassification

    architecture, params = load_base(family)
    labels = ("no", "yes(e1,e2)", "yes(e2,e1)")
    architecture, params, _ = for_task(
        architecture, params, 101, dict.fromkeys(range(97, 101), ()), labels, 0
    )
    save_base(tmp_path / "out", architecture, params, family)
    model, loading_info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    assert (
        model.config.id2label == dict(enumerate(labels))
        and model.config.label2id["yes(e1,e2)"] == 1
    )
    tokens = tokens_of(architecture, 2, 30)
    tokens[:, 5] = 100  # a new one
    assert (
        relative(our_logits(architecture, params, tokens)[:, 0], their_logits(model.eval(), tokens))
        < 1e-4
    )


def test_our_own_folder_keeps_an_encoder_with_and_without_head(family, tmp_path):
    convert(family, tmp_path / "ours", "jaxre", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    assert equal(
        load_file(tmp_path / "back" / "model.safetensors"), load_file(family / "model.safetensors")
    )
    bare = shutil.copytree(family, tmp_path / "bare")
    rewrite(
        bare,
        lambda tensors: {
            name: value for name, value in tensors.items() if not name.startswith("classifier")
        },
    )
    convert(bare, tmp_path / "ours-bare", "jaxre")
    ours, theirs = open_model(tmp_path / "ours-bare", None), open_model(bare, None)
    assert (
        ours.architecture == theirs.architecture
        and ours.architecture.labels == ()
        and equal(ours.base, theirs.base)
    )


def test_names_without_prefix_are_the_same_weights(folder):
    """`BertModel.save_pretrained` writes them so."""
    expected = load_base(folder)
    rewrite(
        folder,
        lambda tensors: {
            name.removeprefix("bert.").removeprefix("roberta."): value
            for name, value in tensors.items()
        },
    )
    assert not any(
        name.startswith(("bert.", "roberta.")) for name in load_file(folder / "model.safetensors")
    )
    assert load_base(folder)[0] == expected[0] and equal(load_base(folder)[1], expected[1])


def test_norms_of_old_conversions_are_the_same_weights(folder):
    expected = load_base(folder)[1]

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    rewrite(folder, lambda tensors: {old(name): value for name, value in tensors.items()})
    assert equal(load_base(folder)[1], expected)


def expected_heads(folder) -> set[str]:
    """Names of the pretraining tensors that transformers' own classifier does not use."""
    from transformers import AutoModelForSequenceClassification

    _, loading_info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    return set(loading_info["unexpected_keys"])


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("BertModel", ("dense",)), ("BertForMaskedLM", ()), ("RobertaForMaskedLM", ())],
)
def test_models_with_another_head_or_none_are_read_without_it(kind, kept, tmp_path):
    """Their own heads and buffers are omitted; BERT's pooler, which a classifier uses too, is
    loaded.
    """
    import transformers

    name = NAMES[kind.startswith("Roberta")]
    config = transformers.AutoConfig.for_model(**SIZES | fields_of(name))
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path / "model")
    rewrite(
        tmp_path / "model",
        lambda tensors: (
            tensors | {f"{config.model_type}.embeddings.position_ids": np.arange(64)[None]}
        ),
    )
    architecture, params = load_base(tmp_path / "model")
    assert architecture.labels == () and architecture.dense == bool(kept)
    assert {name for name in params if name.startswith(("dense", "classifier"))} == {
        n for one in kept for n in (one, f"{one}_bias")
    }
    embed = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(params["embed"], embed)
    done = convert(tmp_path / "model", tmp_path / "ours", "jaxre", verify=True)
    left_out = sorted(
        load_file(tmp_path / "model/model.safetensors").keys() & expected_heads(tmp_path / "model")
    )
    assert list(done.left_out) == left_out and bool(left_out) == (not kept)
    title = " ".join(verification_table(done).title.split())
    for name in left_out:
        assert name in str(done) and name in title
    back = convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert not back.left_out and "left out" not in str(back)
    bare = "Roberta" * kind.startswith("Roberta") or "Bert"
    assert json.loads((tmp_path / "back/config.json").read_text())["architectures"] == [
        f"{bare}Model"
    ]
    loaded, loading_info = transformers.AutoModel.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert (
        not loading_info["unexpected_keys"]
        and not loading_info["mismatched_keys"]
        and all("pooler" in name for name in loading_info["missing_keys"])
    )
    assert np.array_equal(loaded.get_input_embeddings().weight.detach().numpy(), embed)


def test_real_weights_survive_the_round_trip(tmp_path):
    """all-MiniLM-L6-v2: every stored tensor comes back bit for bit under its prefixed name."""
    architecture, params = load_base(minilm())
    save_base(tmp_path / "out", architecture, params, minilm())
    theirs = {
        f"bert.{name}": value
        for name, value in load_file(minilm() / "model.safetensors").items()
        if "position_ids" not in name
    }
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), theirs)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        minilm() / "tokenizer.json"
    ).read_bytes()


# ---- what is refused ------------------------------------------------------------------------


def test_an_encoder_is_not_quantised(family, tmp_path):
    for asked in (
        lambda: load_base(family, quantise="nf4"),
        lambda: open_model(family, None, "nf4"),
        lambda: convert(family, tmp_path / "out", "jaxre", quantise="nf4"),
    ):
        assert "nf4 is for the projections of decoders" in refusal(asked)
    assert not (tmp_path / "out").exists()


def test_adapter_on_an_encoder_is_refused(family, tiny_base, tmp_path):
    architecture, _ = load_base(tiny_base)
    save_adapter(
        tmp_path / "adapter",
        architecture,
        LORA,
        random_factors(architecture, LORA),
        str(family),
        family,
    )
    for asked in (
        lambda: open_model(tmp_path / "adapter", None),
        lambda: convert(tmp_path / "adapter", tmp_path / "out", "hf", merge=True),
    ):
        assert "its base is an encoder" in refusal(asked)


def test_everything_but_the_head_must_be_there_and_every_fault_is_listed(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    first, second = (f"{kind}.encoder.layer.{n}.attention.self.query.bias" for n in (0, 2))
    embed = f"{kind}.embeddings.word_embeddings.weight"

    def change(tensors):
        del tensors[first], tensors[second]
        return tensors | {embed: tensors[embed][:-1], "qa_outputs.weight": np.zeros(3, np.float32)}

    rewrite(folder, change)
    said = refusal(lambda: load_base(folder))
    for part in (
        f"{first} is missing",
        f"{second} is missing",
        f"{embed} has shape [96, 32], expected [97, 32]",
        "qa_outputs.weight is",
    ):
        assert part in said


def test_two_names_for_one_weight_are_refused(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name = "encoder.layer.0.attention.self.query.bias"
    rewrite(folder, lambda tensors: tensors | {name: tensors[f"{kind}.{name}"] + 1})
    said = refusal(lambda: load_base(folder))
    assert name in said and f"{kind}.{name}" in said and "are one weight" in said


@pytest.mark.parametrize("lost", ["weight", "bias"])
def test_half_a_head_is_refused(folder, lost):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    module = "classifier" if kind == "bert" else "classifier.out_proj"
    rewrite(
        folder,
        lambda tensors: {
            name: value for name, value in tensors.items() if name != f"{module}.{lost}"
        },
    )
    said = refusal(lambda: load_base(folder))
    assert (
        f"{module}.bias is not known" in said
        if lost == "weight"
        else f"{module}.bias is missing" in said
    )


def test_a_classifier_needs_the_layer_before_it(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    dense = "bert.pooler.dense" if kind == "bert" else "classifier.dense"
    rewrite(
        folder,
        lambda tensors: {
            name: value for name, value in tensors.items() if not name.startswith(dense)
        },
    )
    assert f"{dense}.weight is missing; {dense}.bias is missing" in refusal(
        lambda: load_base(folder)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"classifier_dropout": -0.1}, "classifier_dropout is -0.1"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings is '64'"),
        ({"id2label": {"0": "a", "1": "a"}}, "names a label twice"),
        ({"id2label": ["a", "b"]}, "wrong type"),
        (
            {"model_type": "roberta", "max_position_embeddings": 2, "pad_token_id": 1},
            "leaves no position",
        ),
    ],
)
def test_encoders_that_we_do_not_have_are_refused(change, message):
    assert message in refusal(lambda: architecture_of(fields_of(NAMES[0]) | change, "config.json"))


def test_a_missing_size_is_named():
    fields = {name: value for name, value in fields_of(NAMES[0]).items() if name != "vocab_size"}
    assert "the field vocab_size is missing" in refusal(
        lambda: architecture_of(fields, "config.json")
    )


def test_labels_follow_their_numbers():
    """Sorted as text, "10" would come before "2"."""
    names = [f"label {number}" for number in range(12)]
    fields = fields_of(NAMES[0], id2label={str(number): name for number, name in enumerate(names)})
    assert architecture_of(fields, "test").labels == tuple(names)
    assert len(LABELS) == len(architecture_of(fields_of(NAMES[0]), "test").labels)
