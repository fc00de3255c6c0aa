"""Prediction rows: labels of the schema with probabilities, or what the model writes."""

import dataclasses
import json
import math

import numpy as np
import pytest
from refusals import refusal

from jaxre.checkpoints.huggingface import save_base
from jaxre.checkpoints.source import Loaded, open_model
from jaxre.config import Predict, Prompt
from jaxre.data.template import ChatTemplate
from jaxre.data.tokenizer import load_tokenizer
from jaxre.errors import InputError
from jaxre.evaluation.predictions import read_predictions, write_predictions
from jaxre.inference.decoding import clean_answer, generate
from jaxre.inference.predict import model_of, predict_examples, stop_ids
from jaxre.relations.prompts import turns
from jaxre.relations.schema import Example

pytestmark = pytest.mark.once

SMOLLM = "HuggingFaceTB/SmolLM2-360M-Instruct"
LABELS = ["born_in", "born", "works_for", "no"]
SETTINGS = Predict(batch_tokens=1024, max_new_tokens=6)


@pytest.fixture(scope="module")
def loaded(models, shared_models) -> Loaded:
    """A random decoder with the real SmolLM2 tokenizer, and an adapter."""
    from jaxre.config import Lora

    model = models.random_model(49_152, adapter=True, kind="llama")
    return Loaded(
        shared_models / SMOLLM,
        "tiny",
        model.architecture,
        model.params,
        Lora(rank=4, alpha=8.0),
        model.factors,
    )


def example(number: int, text: str = "Ada Lovelace was born in London") -> Example:
    return Example(
        f"facts:test:{number}",
        "facts",
        "test",
        f"{text} {'indeed ' * number}.",
        "Ada Lovelace",
        "London",
        "born_in",
    )


EXAMPLES = [example(number) for number in range(7)]


def test_scored_rows_are_always_in_the_schema(loaded):
    rows = predict_examples(loaded, EXAMPLES, LABELS, Prompt(), SETTINGS)
    assert [row.example_id for row in rows] == [one.id for one in EXAMPLES]
    for row in rows:
        assert list(row.probabilities) == LABELS
        assert math.isclose(sum(row.probabilities.values()), 1, rel_tol=1e-12)
        assert row.generated_relation == max(row.probabilities, key=row.probabilities.get)
        assert (row.relation, row.eval_dataset_name, row.gen_type, row.model_id) == (
            "born_in",
            "facts",
            "gen_open",
            "tiny",
        )


def test_scores_equal_brute_force_through_the_template(models, loaded):
    rows = predict_examples(loaded, EXAMPLES, LABELS, Prompt(enumerate=True), SETTINGS)
    template = ChatTemplate(load_tokenizer(loaded.folder), "2026-01-01", "test")
    prompts, answers = [], []
    for one in EXAMPLES:
        encoded = [
            template.encode([(turns(one, Prompt(enumerate=True), LABELS), label)])[0]
            for label in LABELS
        ]
        prompts.append(encoded[0].tokens[: encoded[0].prompt_length])
        supervised = [each.tokens[each.prompt_length :] for each in encoded]
        answers.append([tokens[: template.end_of_turn(tokens)] for tokens in supervised])
    truth = models.brute_force(models.in_transformers(model_of(loaded)), prompts, answers)
    found = np.array([row.score for row in rows])
    assert models.largest_difference(found, truth.max(axis=1)) < 1e-5
    assert [row.generated_relation for row in rows] == [LABELS[i] for i in truth.argmax(axis=1)]
    assert {row.gen_type for row in rows} == {"gen_constrained"}
    assert [row.input_tokens for row in rows] == [len(prompt) for prompt in prompts]


def test_the_best_label_alone_is_that_of_all_scores(loaded):
    every = predict_examples(loaded, EXAMPLES, LABELS, Prompt(enumerate=True), SETTINGS)
    alone = predict_examples(
        loaded, EXAMPLES, LABELS, Prompt(enumerate=True), SETTINGS, mode="best"
    )
    assert [dataclasses.replace(row, score=0, probabilities=None) for row in every] == [
        dataclasses.replace(row, score=0) for row in alone
    ]
    np.testing.assert_allclose(
        [row.score for row in alone], [row.score for row in every], rtol=1e-5
    )


def test_labels_above_a_probability_have_it_and_the_others_a_bound(loaded, tmp_path):
    """This model writes no label with more than 0.1: only the best is sure to be exact."""
    every = predict_examples(loaded, EXAMPLES, LABELS, Prompt(), SETTINGS)
    rows = predict_examples(loaded, EXAMPLES, LABELS, Prompt(), SETTINGS, above=0.1)
    for whole, row in zip(every, rows, strict=True):
        assert row.generated_relation == whole.generated_relation in row.probabilities
        assert sorted([*row.probabilities, *row.bounds]) == sorted(LABELS) and row.bounds
        assert math.isclose(row.probabilities[row.generated_relation], math.exp(row.score))
        for label, share in whole.probabilities.items():
            # a share of the sum over the labels -> the probability of writing the label
            written = math.exp(whole.score) * share / whole.probabilities[whole.generated_relation]
            if label in row.bounds:
                assert written <= row.bounds[label] * (1 + 1e-4) and row.bounds[label] <= 0.1
            else:
                assert math.isclose(row.probabilities[label], written, rel_tol=1e-4)
    write_predictions(tmp_path / "some", rows)
    assert (
        rows
        == read_predictions(tmp_path / "some.csv")
        == read_predictions(tmp_path / "some.parquet")
    )


@pytest.mark.parametrize("above", [0.0, 1.0, -0.5, math.nan])
def test_a_threshold_that_is_no_probability_is_refused(loaded, above):
    with pytest.raises(InputError, match="between 0 and 1"):
        predict_examples(loaded, EXAMPLES, LABELS, Prompt(), SETTINGS, above=above)


def test_a_threshold_goes_with_scores_alone(loaded):
    with pytest.raises(InputError, match="use --mode score"):
        predict_examples(loaded, EXAMPLES, LABELS, Prompt(), SETTINGS, mode="best", above=0.1)


def test_generated_rows_hold_the_cleaned_greedy_text(loaded):
    rows = predict_examples(loaded, EXAMPLES, LABELS, Prompt(), SETTINGS, mode="generate")
    template = ChatTemplate(load_tokenizer(loaded.folder), "2026-01-01", "test")
    texts = [template.render(turns(one, Prompt(), LABELS), generation=True) for one in EXAMPLES]
    written = generate(model_of(loaded), template.tokenize(texts), {2}, 6)
    assert [row.status for row in rows] == [
        "" if tokens[-1] == 2 else "truncated" for tokens in written
    ]
    assert "truncated" in {row.status for row in rows}
    assert [row.prompt for row in rows] == texts
    assert [row.generated_relation for row in rows] == [
        clean_answer(template.tokenizer.decode(one, skip_special_tokens=True)) for one in written
    ]
    assert all(
        row.probabilities is None and row.score < 0 and row.output_tokens <= 6 for row in rows
    )


def test_demonstrations_stand_before_the_question(loaded):
    prompt = Prompt(shots=1)
    rows = predict_examples(
        loaded,
        EXAMPLES[:2],
        LABELS,
        prompt,
        SETTINGS,
        demonstrations=lambda one: [example(3, "Bob works for ACME")],
        model_shot="1",
    )
    assert all(
        row.prompt.index("Bob works for ACME") < row.prompt.index("Ada Lovelace") for row in rows
    )
    assert {(row.prompt_shot, row.model_shot) for row in rows} == {("1", "1")}


def test_rows_survive_the_predictions_table(loaded, tmp_path):
    rows = predict_examples(
        loaded, EXAMPLES, LABELS, Prompt(), SETTINGS, tuned_dataset_name="re_gentune"
    )
    for path in write_predictions(tmp_path / "test", rows):
        assert read_predictions(path) == rows


def test_an_opened_folder_predicts(models, shared_models, tmp_path):
    model = models.random_model(49_152, adapter=False, kind="llama")
    (tmp_path / "config.json").write_text("{}")
    config = json.loads((shared_models / SMOLLM / "config.json").read_text())
    a = model.architecture
    config |= {
        "num_hidden_layers": a.layers,
        "hidden_size": a.embedding,
        "intermediate_size": a.feed_forward,
        "num_attention_heads": a.query_heads,
        "num_key_value_heads": a.kv_heads,
        "rope_theta": a.rope_theta,
        "rms_norm_eps": a.norm_epsilon,
        "head_dim": a.head_channels,
    }
    like = tmp_path / "like"
    like.mkdir()
    for file in (shared_models / SMOLLM).iterdir():
        (like / file.name).write_bytes(file.read_bytes())
    (like / "config.json").write_text(json.dumps(config))
    save_base(tmp_path / "model", a, model.params, like)
    loaded = open_model(tmp_path / "model", np.dtype(np.float32))
    straight = Loaded(like, "model", a, model.params)
    assert predict_examples(loaded, EXAMPLES[:2], LABELS, Prompt(), SETTINGS) == predict_examples(
        straight, EXAMPLES[:2], LABELS, Prompt(), SETTINGS
    )


def test_decoding_stops_at_the_templates_end_of_turn_and_the_end_of_text(shared_models):
    folder = shared_models / "Qwen/Qwen2.5-0.5B-Instruct"
    template = ChatTemplate(load_tokenizer(folder), "2026-01-01", "test")
    assert stop_ids(template, [{"role": "user", "content": "q"}], folder) == {151645, 151643}


def test_a_broken_generation_config_is_one_line(shared_models, tmp_path):
    folder = shared_models / "Qwen/Qwen2.5-0.5B-Instruct"
    template = ChatTemplate(load_tokenizer(folder), "2026-01-01", "test")
    for content in ("{broken", "[2]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'):
        (tmp_path / "generation_config.json").write_text(content)
        message = refusal(lambda: stop_ids(template, [{"role": "user", "content": "q"}], tmp_path))
        assert message.startswith(str(tmp_path / "generation_config.json")), content
        assert "; " in message, content


def test_a_prompt_that_does_not_fit_names_its_example(loaded):
    long = [*EXAMPLES, example(1500)]
    for mode in ("score", "best", "generate"):
        with pytest.raises(InputError, match="example facts:test:1500"):
            predict_examples(
                loaded,
                long,
                LABELS,
                Prompt(),
                SETTINGS.model_copy(update={"max_new_tokens": 1024}),
                mode=mode,
            )


@pytest.mark.parametrize("mode", ["score", "best", "generate"])
def test_scores_that_are_no_numbers_name_their_example(loaded, mode):
    broken = dataclasses.replace(loaded, base=loaded.base | {"norm": loaded.base["norm"] * np.nan})
    message = refusal(
        lambda: predict_examples(broken, EXAMPLES, LABELS, Prompt(), SETTINGS, mode=mode)
    )
    assert message.startswith("example facts:test:") and "NaN" in message


@pytest.mark.parametrize("mode", ["score", "best", "generate"])
def test_no_example_is_an_input_error(loaded, mode):
    with pytest.raises(InputError, match="no example"):
        predict_examples(loaded, [], LABELS, Prompt(), SETTINGS, mode=mode)
