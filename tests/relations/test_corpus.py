"""The promises of jaxre/assets/corpus/README.md."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "jaxre" / "assets" / "corpus"
SPLITS = ("train", "validation", "test")
INVERSE = {
    "author_of": "written_by",
    "parent_of": "child_of",
    "located_in": "contains",
    "founder_of": "founded_by",
}
LABELS = {*INVERSE, *INVERSE.values(), "capital_of", "born_in", "educated_at", "none"}
TYPES = {
    "author_of": ("PERSON", "WORK"),
    "parent_of": ("PERSON", "PERSON"),
    "located_in": ("PLACE", "PLACE"),
    "founder_of": ("PERSON", "ORG"),
    "capital_of": ("PLACE", "PLACE"),
    "born_in": ("PERSON", "PLACE"),
    "educated_at": ("PERSON", "ORG"),
}
TYPES |= {inverse: TYPES[label][::-1] for label, inverse in INVERSE.items()}


def read(split: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (CORPUS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def make_corpus():
    spec = importlib.util.spec_from_file_location("make_corpus", ROOT / "tools" / "make_corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_sources_give_the_committed_bytes(make_corpus, tmp_path):
    for split, path in make_corpus.write_corpus(CORPUS / "source", tmp_path).items():
        assert path.read_bytes() == (CORPUS / f"{split}.jsonl").read_bytes(), (
            f"{split}: run python tools/make_corpus.py"
        )


def test_sizes_are_as_promised(corpus):
    assert len(corpus["train"]) >= 1200 and len({row["text"] for row in corpus["train"]}) >= 1200
    assert len(corpus["validation"]) >= 200
    assert len(corpus["test"]) >= 380


def test_readme_states_the_counts(corpus):
    readme = (CORPUS / "README.md").read_text(encoding="utf-8")
    counts = {split: Counter(row["relation"] for row in rows) for split, rows in corpus.items()}
    for label in LABELS:
        assert re.search(
            rf"\| `{label}` \| "
            + r" \| ".join(str(counts[split][label]) for split in SPLITS)
            + r" \|",
            readme,
        ), label
    texts = " | ".join(str(len({row["text"] for row in corpus[split]})) for split in SPLITS)
    assert f"| distinct sentences | {texts} |" in readme
    assert "| rows | " + " | ".join(str(len(corpus[split])) for split in SPLITS) + " |" in readme


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_complete_and_balanced(corpus, split):
    counts = Counter(row["relation"] for row in corpus[split])
    assert set(counts) == LABELS
    assert 0.15 <= counts.pop("none") / len(corpus[split]) <= 0.20
    assert max(counts.values()) <= 1.3 * min(counts.values())


@pytest.mark.parametrize("split", SPLITS)
def test_spans_cut_out_the_entities(corpus, split):
    for row in corpus[split]:
        text, (a, b), (c, d) = row["text"], row["head_span"], row["tail_span"]
        assert text[a:b] == row["head"] and text[c:d] == row["tail"], row["id"]
        assert b <= c or d <= a, row["id"]
        assert not row["head"].startswith("the ") and not row["tail"].startswith("the "), row["id"]
        if row["relation"] != "none":
            assert (row["head_type"], row["tail_type"]) == TYPES[row["relation"]], row["id"]


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_well_formed(corpus, split):
    for row in corpus[split]:
        text = row["text"]
        assert 8 <= len(text.split()) <= 45, text
        assert text[0].isupper() and text[-1] == "." and text == text.strip(), text
        assert not re.search(r"[{}\[\]|\n]|  |\s[,.;]|,[,.;]|\bthe the\b", text, re.IGNORECASE), (
            text
        )
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouhAEIOUH]", text), text


def test_ids_are_unique_and_no_row_repeats(corpus):
    rows = [row for split in SPLITS for row in corpus[split]]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len(
        {(row["text"], tuple(row["head_span"]), tuple(row["tail_span"])) for row in rows}
    ) == len(rows)
    assert max(Counter(row["text"] for row in rows).values()) == 2


def test_entities_of_one_split_are_unseen_in_the_others(corpus):
    for split in ("validation", "test"):
        names = {row[side].casefold() for row in corpus[split] for side in ("head", "tail")}
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names))) + r")(?!\w)")
        for other in set(SPLITS) - {split}:
            marked = {row[side].casefold() for row in corpus[other] for side in ("head", "tail")}
            assert not names & marked
            # Stronger: not even as an unmarked name of the sentence.
            assert not [
                row["text"] for row in corpus[other] if pattern.search(row["text"].casefold())
            ]


def test_phrasings_of_one_split_are_unseen_in_the_others(make_corpus):
    def skeleton(text: str) -> str:
        return re.sub(r"[^a-z{}_ ]", "", re.sub(r"[\[\]]", "", text.casefold())).strip()

    for section in make_corpus.read_sections(CORPUS / "source"):
        texts = {
            split: {skeleton(t) for s, _, t in section.phrasings + section.negatives if s == split}
            for split in SPLITS
        }
        found = Counter(text for split in SPLITS for text in texts[split])
        assert max(found.values()) == 1, (section.file, found.most_common(1))
        if section.forward != "none":
            counts = Counter(split for split, _, _ in section.phrasings)
            assert counts["train"] >= 12 and counts["validation"] >= 5 and counts["test"] >= 6, (
                section.file
            )


@pytest.mark.parametrize("split", SPLITS)
def test_both_orders_of_mention_occur_for_every_label(corpus, split):
    orders = Counter(
        (row["relation"], row["head_span"] < row["tail_span"]) for row in corpus[split]
    )
    for label in LABELS:
        least = 0.25 if split == "train" else 0.10
        total = orders[label, True] + orders[label, False]
        assert min(orders[label, True], orders[label, False]) >= least * total, label


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("label", INVERSE)
def test_exchanged_head_and_tail_carry_the_inverse_label(corpus, split, label):
    rows = {(row["text"], row["head"], row["tail"]): row["relation"] for row in corpus[split]}
    exchanged = [
        (rows[key], rows[key[0], key[2], key[1]])
        for key in rows
        if (key[0], key[2], key[1]) in rows
    ]
    pairs = [pair for pair in exchanged if label in pair]
    assert len(pairs) >= 5
    assert set(pairs) <= {(label, INVERSE[label]), (INVERSE[label], label)}
