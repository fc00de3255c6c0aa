"""Encoders through the same loop: packing is exact, runs resume, predictions are the softmax of the
exported head.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from refusals import refusal
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny import tiny_config, write_tiny_model
from tiny_decoders import ground_truth, relative
from tiny_encoders import encoder_config, fields_of, write_sentences, write_tiny_encoder

from jaxre.checkpoints.source import open_model, tokenizer_folder
from jaxre.config import Kernels, Mesh, load_config
from jaxre.data.packing import RowShape, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import Rows, fill_rows
from jaxre.data.template import Encoded
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import TokenSet
from jaxre.evaluation.metrics.scores import score
from jaxre.inference.commands import predict_data, predict_text
from jaxre.models import kernels
from jaxre.models.architecture import architecture_of
from jaxre.models.kernels import ops_of
from jaxre.models.module import init_weights
from jaxre.models.ops import ONE_DEVICE, Ops
from jaxre.models.sharding import make_mesh
from jaxre.objectives import classify
from jaxre.training.log import read_log
from jaxre.training.loop import described_validation, train
from jaxre.training.step import dropout_keys

ROW, EXAMPLES, STEP = 64, 24, 5
# Relative, per tensor: f32 sums in another order; the promise of the design.
TOLERANCE = 1e-5


# ---- packing is exact -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    draw = np.random.default_rng(0)
    lengths = [59, *draw.integers(1, 40, EXAMPLES - 1).tolist()]
    encoded = [Encoded(draw.integers(8, 97, length).tolist(), length) for length in lengths]
    made = TokenSet.of(encoded, [f"example-{number}" for number in range(EXAMPLES)])
    return TokenSet(
        made.tokens,
        made.starts,
        made.prompt_lengths,
        made.ids,
        draw.integers(0, 5, EXAMPLES).astype(np.int32),
    )


def alone(tokens: TokenSet) -> Rows:
    """One example a row, padded, written without `fill_rows`; a pad sees the other pads."""
    B, T = EXAMPLES, ROW
    lengths = tokens.lengths[:, None]
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    padded = np.zeros((B, T), np.int32)
    for b in range(B):
        padded[b, : lengths[b, 0]] = tokens[b]
    first = np.zeros((B, 8), np.int32)
    return Rows(
        tokens=padded,
        positions=np.where(places < lengths, places, 0),
        visible_until=np.where(places < lengths, lengths, T + 1).astype(np.int32),
        owner=np.broadcast_to(tokens.owners[:, None], (B, T)),
        supervised=first,
        targets=np.where(np.arange(8) == 0, tokens.labels[:, None], 0).astype(np.int32),
        weights=np.broadcast_to((np.arange(8) == 0).astype(np.float32), (B, 8)),
    )


@partial(jax.jit, static_argnums=(2, 3, 4))
def gradients(params, rows: Rows, architecture, dropout: bool, ops: Ops = ONE_DEVICE):
    def loss(params):
        keys = dropout_keys(7, jnp.int32(STEP), rows) if dropout else None
        total = classify.loss_sum(params, None, rows, architecture, ops, keys=keys)
        return total / jnp.sum(rows.weights)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    ("name", "dropout", "kernel"),
    [
        ("bert, two token types", True, None),
        ("roberta, positions from 2", False, None),
        ("bert, two token types", False, "pallas_tpu"),
    ],
)
def test_packed_loss_and_gradients_equal_one_example_a_row(
    tokens: TokenSet, name: str, dropout: bool, kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = architecture_of(fields_of(name, hidden_dropout_prob=0.3), "test")
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * draw.standard_normal(leaf.shape), jnp.float32),
        init_weights(architecture, 0),
    )
    reference_loss, reference = gradients(params, alone(tokens), architecture, dropout)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(reference))
    ops = ONE_DEVICE
    if kernel:
        call = pl.pallas_call
        monkeypatch.setattr(
            pl, "pallas_call", lambda *given, **more: call(*given, **more | {"interpret": True})
        )
        monkeypatch.setitem(
            kernels.HARDWARE, kernel, kernels.HARDWARE[kernel]._replace(platform="cpu")
        )
        ops = ops_of(Kernels(attention=kernel), make_mesh(Mesh(), jax.devices()[:1]))
    for seed in (0, 1):
        plan = plan_by_tokens(
            tokens.lengths,
            tokens.supervised,
            find_prefixes(tokens),
            seed=seed,
            epochs=1,
            row_length=ROW,
            rows=EXAMPLES,
            accumulation=1,
        )
        (packed,) = plan.updates[0].micro
        assert max(map(len, packed)) > 2
        rows = fill_rows(tokens, find_prefixes(tokens), packed, RowShape(EXAMPLES, ROW, 8))
        loss, found = gradients(params, rows, architecture, dropout, ops)
        assert abs(float(loss / reference_loss) - 1) < TOLERANCE
        # The bias of the keys shifts all scores of a query equally: its gradient is rounding.
        pairs = zip(*(without_key_bias(one) for one in (found, reference)), strict=True)
        assert max(relative(a, b) for a, b in pairs) < TOLERANCE
    if dropout:
        without, _ = gradients(params, alone(tokens), architecture, False)
        assert abs(float(without / reference_loss) - 1) > 1e-3


def without_key_bias(tree) -> list:
    return [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key != "k_bias"
    ]


# ---- a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, said: Console) -> Path:
    folder = tmp_path_factory.mktemp("encoder-run")
    model = write_tiny_encoder(folder / "model")
    return train(
        encoder_config(folder, model, train={"epochs": 5, "checkpoint_every": 3, "keep": 99}), said
    )


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_log(run) if record["kind"] == "train"]


def test_an_encoder_learns(finished: Path, said: Console) -> None:
    found = losses(finished)
    assert np.mean(found[-3:]) < 0.6 * np.mean(found[:3])  # 1.1 to 0.5 measured
    printed = said.file.getvalue()
    assert (
        "labels (drawn at random: classifier, classifier_bias)" in printed
        and "marker tokens; dropout 0.1" in printed
    )
    for record in read_log(finished):
        if record["kind"] == "validation":
            assert set(record) == {"kind", "step", "loss", "f1", "accuracy", "collapsed"}


def test_a_resumed_run_continues_the_exact_loss_curve(finished: Path, tmp_path: Path) -> None:
    """Dropout is on: its masks follow step and example, whatever process draws them."""
    expected = losses(finished)
    copy = shutil.copytree(finished, tmp_path / "runs" / "run")
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > 6:
            shutil.rmtree(checkpoint)
    config = load_config(finished / "config.yaml", [f"output={tmp_path / 'runs'}"])
    assert losses(train(config)) == expected and len(expected) > 12
    assert (copy / "model" / "model.safetensors").read_bytes() == (
        finished / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_losses_and_validation_on_several_devices_equal_those_of_one(
    finished: Path, tmp_path: Path
) -> None:
    """Four CPU devices, weights and rows split over two each; in a process of its own, as JAX
    splits the CPU once.
    """
    settings = [
        f"output={tmp_path}",
        "mesh.cpu_devices=4",
        "mesh.fsdp=2",
        "train.max_steps=6",
        "train.batch_examples=16",
    ]
    command = [
        sys.executable,
        "-m",
        "jaxre.cli",
        "train",
        str(finished / "config.yaml"),
        *settings,
        "train.schedule=constant",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = load_config(
        finished / "config.yaml",
        [f"output={tmp_path}", "name=one", *settings[3:], "train.schedule=constant"],
    )
    one, several = train(config), tmp_path / "run"
    # Adam magnifies the rounding of the first gradients
    np.testing.assert_allclose(losses(several), losses(one), rtol=1e-4)
    ours, theirs = (
        [r for r in read_log(run) if r["kind"] == "validation"] for run in (several, one)
    )
    assert (
        ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-3)
        and len(ours) == len(theirs) == 1
    )


def test_predictions_are_the_softmax_of_the_exported_head_in_transformers(finished: Path) -> None:
    """The marked text of each row, through the exported tokenizer and model alone."""
    torch = ground_truth("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = predict_data(
        str(finished), None, None, "score", None, None, Console(file=io.StringIO())
    ).rows
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        finished / "model", output_loading_info=True
    )
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert len(rows) == 24
    with torch.no_grad():
        for row in rows:
            theirs = torch.softmax(
                model.eval()(**tokenizer(row.prompt, return_tensors="pt")).logits[0], -1
            ).numpy()
            ours = np.array(
                [row.probabilities[model.config.id2label[number]] for number in range(len(theirs))]
            )
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
            assert row.generated_relation == model.config.id2label[int(theirs.argmax())]
            assert row.score == pytest.approx(np.log(theirs.max()), abs=1e-5)


def test_one_marked_text_is_predicted(finished: Path) -> None:
    table = predict_text(
        str(finished), "<e1>Paris</e1> is the capital of <e2>France</e2>.", "score", None
    )
    shares = [float(cell) for cell in table.columns[1].cells]
    assert (
        len(shares) == len(open_model(finished, None).architecture.labels)
        and abs(sum(shares) - 1) < 0.01
    )


def test_scores_that_are_no_numbers_name_their_example(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = load_file(run / "model" / "model.safetensors")
    save_file(
        weights | {"classifier.bias": weights["classifier.bias"] * np.float32(np.nan)},
        run / "model" / "model.safetensors",
    )
    assert "NaN" in refusal(
        lambda: predict_data(str(run), None, None, "score", None, None, Console(file=io.StringIO()))
    )


def test_types_that_training_did_not_have_are_counted(finished: Path, tmp_path: Path) -> None:
    data = tmp_path / "other.jsonl"
    data.write_text(
        '{"text": "Ada saw Rome.", "head": "Ada", "tail": "Rome", "head_type": "PER", "tail_type":'
        ' "PLANET"}\n'
    )
    console = Console(file=io.StringIO(), width=200)
    predict_data(str(finished), str(data), None, "score", None, None, console)
    assert (
        "entities of 1 of 1 examples have no type, or none that training had"
        in console.file.getvalue()
    )


def test_a_text_without_types_is_reported_to_get_untyped_markers(finished: Path) -> None:
    table = predict_text(str(finished), "<e1>Ada</e1> saw <e2>Rome</e2>.", "score", None)
    assert "no type, or none that training had; they get the untyped marker" in table.caption


def test_validation_figures_are_those_of_the_predictions(finished: Path, tmp_path: Path) -> None:
    """They choose the checkpoint that is exported."""
    best = next(record["best_step"] for record in read_log(finished) if record["kind"] == "end")
    validated = next(
        record
        for record in read_log(finished)
        if record["kind"] == "validation" and record["step"] == best
    )
    source = str(load_config(finished / "config.yaml").data.validation.dataset)
    rows = predict_data(
        str(finished), source, None, "score", tmp_path / "out", None, Console(file=io.StringIO())
    ).rows
    found = score([row.relation for row in rows], [row.generated_relation for row in rows])
    loss = -np.mean([np.log(row.probabilities[row.relation]) for row in rows])
    assert (validated["f1"], validated["accuracy"]) == (found.f1, found.accuracy) and found.f1 > 0.5
    assert validated["loss"] == pytest.approx(loss, rel=1e-5)


def test_labels_of_a_head_may_be_in_any_order(finished: Path, tmp_path: Path) -> None:
    """A head that transformers trained has the order of its id2label, ours is sorted."""
    folder, order = shutil.copytree(finished / "model", tmp_path / "model"), [2, 0, 1]
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    tensors |= {
        name: np.ascontiguousarray(tensors[name][order])
        for name in ("classifier.weight", "classifier.bias")
    }
    save_file(tensors, folder / "model.safetensors")
    labels = [config["id2label"][str(number)] for number in order]
    config |= {"id2label": {str(number): label for number, label in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config))
    console = Console(file=io.StringIO(), width=200)
    ours, theirs = (
        predict_data(
            str(model), None, None, "score", tmp_path / "out", finished / "config.yaml", console
        ).rows
        for model in (finished, folder)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (
            one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
            and one.generated_relation == other.generated_relation
        )
    further = train(encoder_config(tmp_path, folder, "further", train={"epochs": 1}), console)
    assert (
        "labels (from the model)" in console.file.getvalue()
        and losses(further)[0] < 0.9 * losses(finished)[0]
    )


def test_a_run_is_trained_further_with_its_own_head_and_markers(
    finished: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = encoder_config(tmp_path, finished, "further", train={"epochs": 1})
    run = train(config, console)
    assert "labels (from the model); 0 new marker tokens" in console.file.getvalue()
    assert losses(run)[0] < losses(finished)[0]
    assert open_model(run, None).architecture == open_model(finished, None).architecture


def test_a_run_by_tokens_with_accumulation_and_one_example(tmp_path: Path) -> None:
    model = write_tiny_encoder(
        tmp_path / "model",
        "roberta, positions from 2",
        num_hidden_layers=1,
        max_position_embeddings=100,
    )
    data = {
        "train": {"dataset": str(write_sentences(tmp_path / "one.jsonl", 1, 0))},
        "validation": None,
        "labels": None,
    }
    config = encoder_config(
        tmp_path,
        model,
        data=data,
        train={"batch_examples": None, "batch_tokens": 512, "accumulation": 2, "epochs": 1},
    )
    assert len(losses(train(config))) == 1


# ---- collapse ---------------------------------------------------------------------------------


def test_a_run_that_predicts_one_class_is_flagged_in_its_log(tmp_path: Path) -> None:
    """Weights for which all texts are the same, and a learning rate that changes nothing."""
    model = write_tiny_encoder(tmp_path / "model", initializer_range=1e-6)
    console = Console(file=io.StringIO(), width=200)
    run = train(
        encoder_config(tmp_path, model, train={"epochs": 1, "learning_rate": 1e-12}), console
    )
    (validated,) = (record for record in read_log(run) if record["kind"] == "validation")
    assert validated["collapsed"] is True
    assert "COLLAPSED" in console.file.getvalue()
    found = predict_data(str(run), None, None, "score", None, None, console)
    assert len({row.generated_relation for row in found.rows}) == 1 and "COLLAPSED" in str(
        found.summary
    )


def test_the_line_on_a_validation_has_no_flag_without_a_collapse() -> None:
    assert (
        described_validation({"loss": 1.0, "f1": 0.5, "collapsed": False})
        == "validation loss 1.0000  validation f1 0.5000"
    )


# ---- what is refused --------------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    """The markers are added to the model; tokens of its own tokenizer must have been there."""
    model = write_tiny_encoder(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([f"extra{number}" for number in range(600 - len(tokenizer) + 3)])
    tokenizer.save_pretrained(model)
    said = refusal(lambda: train(encoder_config(tmp_path, model)))
    assert "token 602" in said and "vocab_size of the model is 600" in said
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_whose_ids_have_gaps_is_refused(tmp_path: Path) -> None:
    """New tokens are numbered by how many there are: two of them would share the ids of words."""
    model = write_tiny_encoder(tmp_path / "model")
    path = model / "tokenizer.json"
    fields = json.loads(path.read_text())
    for word in list(fields["model"]["vocab"])[100:102]:
        del fields["model"]["vocab"][word]
    path.write_text(json.dumps(fields))
    assert "ids have gaps" in refusal(lambda: train(encoder_config(tmp_path, model)))


def test_an_example_longer_than_the_model_reads_is_refused(tmp_path: Path) -> None:
    model = write_tiny_encoder(tmp_path / "model", max_position_embeddings=10)
    assert "the model reads 10" in refusal(lambda: train(encoder_config(tmp_path, model)))


def test_encoders_and_decoders_are_not_confused(tmp_path: Path, finished: Path) -> None:
    encoder, decoder = (
        write_tiny_encoder(tmp_path / "encoder"),
        write_tiny_model(tmp_path / "decoder"),
    )
    assert "is an encoder (bert); set train.objective=classify" in refusal(
        lambda: tokenizer_folder(tiny_config(tmp_path, encoder))
    )
    assert "is a decoder (qwen2)" in refusal(
        lambda: tokenizer_folder(encoder_config(tmp_path, decoder))
    )


def test_prediction_without_a_head_or_with_other_labels_is_refused(
    finished: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO())
    model, config = write_tiny_encoder(tmp_path / "model"), finished / "config.yaml"
    assert "no head yet" in refusal(
        lambda: predict_data(str(model), None, None, "score", tmp_path / "out", config, console)
    )
    assert "no generate mode" in refusal(
        lambda: predict_data(str(finished), None, None, "generate", None, None, console)
    )
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"method": "lora"}}, "train.method=full"),
        ({"train": {"prompt_weight": 0.1}}, "has no prompt"),
        ({"prompt": {"shots": 2}}, "has no prompt"),
        ({"data": {"train": None}}, "needs data.train"),
    ],
)
def test_settings_that_an_encoder_does_not_have_are_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    assert message in refusal(lambda: encoder_config(tmp_path, tmp_path, **changes))
