"""Mixtures: the study's shuffles (`datasets` is the truth), equal domains, caps, and what cannot be
mixed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from refusals import refusal

from jaxre.config import Mixture, Source, parse_yaml
from jaxre.relations import mixtures, sources
from jaxre.relations.hub import PREFIX
from jaxre.relations.tables import SUFFIXES

CONFIGS = Path(__file__).parents[2] / "configs"

disable_progress_bars()


def table(folder: Path, name: str, count: int, domain: str = "general", **fields: object) -> str:
    path = folder / f"{name}.jsonl"
    row = {"head": "Ada", "tail": "Bob", "relation": "met", "domain": domain, **fields}
    path.write_text(
        "".join(
            json.dumps({"id": str(n), "text": f"Ada met Bob {n}.", **row}) + "\n"
            for n in range(count)
        ),
        encoding="utf-8",
    )
    return str(path)


def mixture(*names: str, limits: tuple[int | None, ...] = (), **settings: object) -> Mixture:
    limits = limits or (None,) * len(names)
    given = [Source(dataset=name, limit=limit) for name, limit in zip(names, limits, strict=True)]
    return Mixture(sources=tuple(given), **settings)


def ids(examples) -> list[str]:
    return [example.id for example in examples]


def as_dataset(name: str) -> Dataset:
    return Dataset.from_dict({"id": ids(sources.load(Source(dataset=name)))})


@pytest.mark.parametrize(
    ("sizes", "limit"), [((7, 3), None), ((7, 3), 4), ((7, 3), 100), ((1,), None), ((20, 1, 9), 29)]
)
def test_a_pool_is_shuffled_and_capped_as_datasets_does_it(
    tmp_path: Path, sizes: tuple[int, ...], limit: int | None
) -> None:
    names = [table(tmp_path, f"set{n}", size) for n, size in enumerate(sizes)]
    truth = concatenate_datasets([as_dataset(name) for name in names]).shuffle(seed=42)
    if limit is not None and limit < len(truth):
        truth = truth.shuffle(seed=42).select(range(limit))
    assert ids(mixtures.load(mixture(*names, limit=limit), "data.train")) == truth["id"][:]


@pytest.mark.parametrize("sizes", [(9, 4), (4, 9), (5, 5), (1, 30)])
def test_domains_are_balanced_as_the_protocol_says(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """General shuffled with seed 42, literary with 43, the smaller number of each, the mix with
    44.
    """
    general, literary = (
        table(tmp_path, "a", sizes[0]),
        table(tmp_path, "b", sizes[1], domain="literary"),
    )
    more = table(tmp_path, "c", 3)
    parts = [
        concatenate_datasets([as_dataset(general), as_dataset(more)]).shuffle(seed=42),
        as_dataset(literary).shuffle(seed=43),
    ]
    count = min(map(len, parts))
    truth = concatenate_datasets([part.select(range(count)) for part in parts]).shuffle(seed=44)[
        "id"
    ][:]
    pool = mixtures.read(mixture(general, literary, more, balance="domains"), "data.train")
    assert ids(pool.examples) == truth
    assert Counter(example.domain for example in pool.examples) == {
        "general": count,
        "literary": count,
    }


def test_counts_are_of_each_source_after_its_own_cap(tmp_path: Path) -> None:
    names = [table(tmp_path, "a", 10), table(tmp_path, "b", 6, domain="literary")]
    pool = mixtures.read(
        mixture(*names, limits=(4, None), balance="domains", limit=7), "data.train"
    )
    used = Counter(example.dataset for example in pool.examples)
    assert [(one.source, one.domain, one.read, one.used) for one in pool.counts] == [
        ("a.jsonl", "general", 4, used["a"]),
        ("b.jsonl", "literary", 6, used["b"]),
    ]
    assert sum(used.values()) == 7 and {
        name: len(examples) for name, examples in pool.by_dataset.items()
    } == {"a": 4, "b": 6}


def test_a_single_source_is_read_as_it_is(tmp_path: Path) -> None:
    source = Source(dataset=table(tmp_path, "a", 5))
    pool = mixtures.read(source, "data.train")
    assert pool.examples == sources.load(source) and pool.by_dataset == {"": pool.examples}
    assert [(one.read, one.used) for one in pool.counts] == [(5, 5)]


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    general, other = table(tmp_path, "a", 3), table(tmp_path, "b", 3, domain="poetry")
    assert "none is literary" in refusal(
        lambda: mixtures.load(mixture(general, balance="domains"), "data.train")
    )
    assert "'poetry' is no domain" in refusal(
        lambda: mixtures.load(mixture(general, other, balance="domains"), "data.train")
    )
    assert "data.train: 3 examples are in two of its sources (first a/" in refusal(
        lambda: mixtures.load(mixture(general, general), "data.train")
    )


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    # They would be one dataset, with the labels of both, whether their ids are the same or not.
    first = table(tmp_path, "a", 20)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text(
        Path(first).read_text().replace('"id": "', '"id": "second'), encoding="utf-8"
    )
    message = refusal(
        lambda: mixtures.load(mixture(first, str(tmp_path / "other" / "a.jsonl")), "data.train")
    )
    assert (
        f"data.train: {first} and " in message
        and "would be one dataset, a," in message
        and "rename one" in message
    )
    # A benchmark has a name, too.
    message = refusal(
        lambda: mixtures.load(mixture("gids", table(tmp_path, "gids", 3)), "data.train")
    )
    assert "data.train: gids and " in message and "would be one dataset, gids," in message
    # Parts of one file are not two.
    parts = (
        Source(dataset=first, part=(0.0, 0.5)),
        Source(dataset=str(tmp_path / "other" / ".." / "a.jsonl"), part=(0.5, 1.0)),
    )
    assert len(mixtures.load(Mixture(sources=parts), "data.train")) == 20


def test_a_mixture_has_the_name_that_predictions_give_it(tmp_path: Path) -> None:
    assert mixtures.name_of(mixture("facts", "gids", "facts", name="re_gentune")) == "re_gentune"
    assert (
        mixtures.name_of(mixture("facts", "gids", "facts")) == "facts+gids"
        and mixtures.name_of(Source(dataset="gids")) == "gids"
    )


def named_datasets(tree: object) -> list[str]:
    """Every value of a key `dataset` in a config."""
    if isinstance(tree, dict):
        here = [tree["dataset"]] if isinstance(tree.get("dataset"), str) else []
        return here + [name for value in tree.values() for name in named_datasets(value)]
    return (
        [name for value in tree for name in named_datasets(value)] if isinstance(tree, list) else []
    )


def test_every_dataset_that_a_shipped_config_names_can_be_read() -> None:
    """The study's config named a source by another name than its registry: its mixture could not be
    built.
    """
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert any(path.parent.name == "mixtures" for path in files)
    unknown = {
        (path.name, name)
        for path in files
        for name in named_datasets(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
        if name not in sources.BENCHMARKS
        and not name.startswith(PREFIX)
        and not name.endswith(SUFFIXES)
    }
    assert not unknown
