"""An encoder's input: entity markers as single tokens, and the words around them as they would be
without.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refusals import refusal
from tiny_encoders import encoder_config, minilm, write_tiny_encoder

from jaxre.data.markers import add_markers, encode_marked, marked_text, markers_in, unknown_types
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import fill_rows
from jaxre.data.tokenizer import load_tokenizer
from jaxre.objectives import load_dataset
from jaxre.relations.schema import Example

TEXT = "In 1843, Ada Lovelace wrote her Notes (on the engine)."


def example(text: str = TEXT, **given: str | None) -> Example:
    entities = {
        "head": "Ada Lovelace",
        "tail": "Notes",
        "head_type": "PER",
        "tail_type": "Work Of Art",
    } | given
    return Example("one", "test", "test", text, relation="wrote", **entities)


@pytest.fixture(params=["MiniLM", "RoBERTa"])
def tokenizer(request, shared_models: Path):
    return load_tokenizer(
        minilm() if request.param == "MiniLM" else shared_models / "FacebookAI" / "roberta-base"
    )


def test_each_marker_is_one_token_and_the_words_stay_what_they_are(tokenizer) -> None:
    """Real WordPiece and real byte-level BPE: without its four markers, a marked sentence has the
    tokens of the plain one.
    """
    before = len(tokenizer)
    new = add_markers(tokenizer, [example()])
    assert len(new) == 8 and min(new) == before and max(new) == before + 7 == len(tokenizer) - 1
    text = marked_text(example(), markers_in(tokenizer))
    assert (
        text
        == "In 1843, [E1:PER] Ada Lovelace [/E1:PER] wrote her [E2:Work Of Art] Notes [/E2:Work Of"
        " Art] (on the engine)."
    )
    tokens = encode_marked([example()], [text], tokenizer)[0].tolist()
    assert [token for token in tokens if token not in new] == tokenizer(TEXT)["input_ids"]
    names = tokenizer.convert_ids_to_tokens([token for token in tokens if token in new])
    assert names == ["[E1:PER]", "[/E1:PER]", "[E2:Work Of Art]", "[/E2:Work Of Art]"]
    assert tokens[0] == tokenizer.cls_token_id and tokens[-1] == tokenizer.sep_token_id
    described = [
        tokenizer.decode(new[tokenizer.convert_tokens_to_ids(name)]).strip() for name in names
    ]
    assert described == ["@ per", "@ per", "# work of art", "# work of art"]


def test_markers_survive_saving(tokenizer, tmp_path: Path) -> None:
    add_markers(tokenizer, [example()])
    text = marked_text(example(), markers_in(tokenizer))
    expected = encode_marked([example()], [text], tokenizer)[0]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert markers_in(loaded) == markers_in(tokenizer)
    assert np.array_equal(encode_marked([example()], [text], loaded)[0], expected)
    assert add_markers(loaded, [example()]) == {}


def test_long_texts_are_not_cut(tokenizer) -> None:
    """MiniLM's tokenizer.json says to cut at 128 tokens and to pad up to them."""
    add_markers(tokenizer, [])
    texts = [" ".join(["word"] * 300), "word"]
    tokens = encode_marked([example(), example()], texts, tokenizer)
    assert tokens.lengths.tolist() == [302, 3]


@pytest.mark.parametrize(
    ("given", "marked"),
    [
        (
            {"head_type": None, "tail_type": None},
            "In 1843, [E1] Ada Lovelace [/E1] wrote her [E2] Notes [/E2] (on the engine).",
        ),
        (
            {"head_type": "ORG"},
            (
                "In 1843, [E1] Ada Lovelace [/E1] wrote her [E2:Work Of Art] Notes [/E2:Work Of"
                " Art] (on the engine)."
            ),
        ),
        (
            {"tail": "Lovelace", "tail_type": None},
            "In 1843, [E1:PER] Ada [E2] Lovelace [/E2] [/E1:PER] wrote her Notes (on the engine).",
        ),
        (
            {"tail": "Babbage"},
            "In 1843, [E1:PER] Ada Lovelace [/E1:PER] wrote her Notes (on the engine).",
        ),
    ],
    ids=["no types", "a type that training did not have", "nested", "not in the text"],
)
def test_what_is_marked(tmp_path: Path, given: dict, marked: str) -> None:
    tokenizer = load_tokenizer(write_tiny_encoder(tmp_path))
    add_markers(tokenizer, [example()])
    assert marked_text(example(**given), markers_in(tokenizer)) == marked
    untyped = (marked.count(":") < 4 and "tail" not in given) or "tail_type" in given
    assert unknown_types([example(**given)], markers_in(tokenizer)) == (["one"] if untyped else [])


def test_a_text_that_holds_a_marker_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_encoder(tmp_path))
    add_markers(tokenizer, [])
    said = refusal(lambda: marked_text(example(TEXT + " [/E2] or so"), markers_in(tokenizer)))
    assert "example one" in said and "[/E2]" in said


def test_a_tokenizer_without_markers_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_encoder(tmp_path))
    assert "no entity markers" in refusal(lambda: encode_marked([example()], [TEXT], tokenizer))


def test_a_tokenizer_that_does_not_begin_with_its_classification_token_is_refused(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(write_tiny_encoder(tmp_path))
    add_markers(tokenizer, [])
    tokenizer.cls_token = "[MASK]"
    assert "classification token" in refusal(lambda: encode_marked([example()], [TEXT], tokenizer))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("marked")
    return load_dataset(
        encoder_config(folder, write_tiny_encoder(folder / "model")), folder / "model"
    )


def test_markers_are_those_of_the_training_split(dataset) -> None:
    known = markers_in(dataset.tokenizer)
    assert known == {
        "[E1]",
        "[/E1]",
        "[E2]",
        "[/E2]",
        "[E1:PER]",
        "[/E1:PER]",
        "[E2:LOC]",
        "[/E2:LOC]",
    }
    assert set(dataset.tokenizer.convert_tokens_to_ids(list(known))) == set(dataset.new_tokens)


def test_each_example_is_supervised_once_at_its_first_token_with_its_label(dataset) -> None:
    tokens = dataset.train.tokens
    assert tokens.supervised.tolist() == [1] * len(tokens)
    from jaxre.data.packing import plan_by_tokens

    plan = plan_by_tokens(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=0,
        epochs=1,
        row_length=64,
        rows=64,
        accumulation=1,
    )
    rows = fill_rows(tokens, find_prefixes(tokens), plan.updates[0].micro[0], plan.updates[0].shape)
    assert rows.weights.sum() == len(tokens)
    names = {one.id: one.relation for one in dataset.train.examples}
    for b, members in enumerate(plan.updates[0].micro[0]):
        start = 0
        for s, member in enumerate(members):
            assert rows.supervised[b, s] == start and rows.weights[b, s] == 1
            assert rows.tokens[b, start] == dataset.tokenizer.cls_token_id
            assert dataset.schema.labels[rows.targets[b, s]] == names[tokens.ids[member]]
            start += len(tokens[member])
        assert not rows.weights[b, len(members) :].any()


def test_a_subset_keeps_its_labels(dataset) -> None:
    tokens = dataset.train.tokens
    chosen = np.arange(len(tokens)) % 3 == 1
    assert np.array_equal(tokens.subset(chosen).labels, tokens.labels[chosen])


def test_labels_are_not_part_of_the_cache(tmp_path: Path) -> None:
    """Another schema numbers the labels anew and reads the same tokens."""
    model = write_tiny_encoder(tmp_path / "model")
    config = encoder_config(tmp_path, model)
    first = load_dataset(config, model)
    second = load_dataset(
        encoder_config(tmp_path, model, data={"labels": ["a new one", *config.data.labels]}), model
    )
    assert not first.train.from_cache and second.train.from_cache
    shifted = [second.schema.labels[number] for number in second.train.tokens.labels]
    assert shifted == [first.schema.labels[number] for number in first.train.tokens.labels]
    assert not np.array_equal(first.train.tokens.labels, second.train.tokens.labels)
