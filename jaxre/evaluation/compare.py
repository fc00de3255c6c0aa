"""Compares our predictions with cached answers of another model, example by example.

    cache = read_cache(cache_path, examples)
    comparison = compare(read_predictions(path), cache, read_label_map(labels))
    print(comparison.to_json()["difference"])

Rows join by example id, by prompt hash, or by the proof of the cache's adapter (frontier/cache.py).
Rows that do not join are counted and listed with the reason, never guessed. The cache is checked
first: its coverage of our examples, its gold labels, its label spellings. A problem is a warning
above the figures, or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.config import Source
from jaxre.errors import InputError
from jaxre.evaluation.frontier.cache import (
    ENOUGH,
    Answer,
    Cache,
    common_gold,
    common_label,
    gold_differs,
    join,
    one_negative,
    same_dataset,
)
from jaxre.evaluation.frontier.read import read_cache
from jaxre.evaluation.metrics.scores import Scores, score
from jaxre.evaluation.metrics.significance import (
    Interval,
    McNemar,
    PairedBootstrap,
    bootstrap_f1,
    mcnemar,
    paired_bootstrap,
)
from jaxre.evaluation.predictions import Prediction, read_predictions
from jaxre.relations.label_map import LabelMap, read_label_map
from jaxre.relations.schema import Example, is_negative, normalise_label
from jaxre.relations.sources import load

# More unrelated pairs per related pair than any sentence has: a cache covers all pairs of a
# sentence, predictions only the pairs that their run drew.
ALL_PAIRS = 1e6
SHOWN = 5


@dataclass(frozen=True)
class Quadrant:
    """Number of examples where ours and cached are right or wrong, with the first few ids."""

    ours_right: bool
    cached_right: bool
    count: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same joined examples. difference: ours - cached, in positive-class
    micro-F1.
    """

    ours_name: str
    cached_name: str
    predictions: int
    joined: int
    ours: Scores
    cached: Scores
    ours_f1: Interval
    cached_f1: Interval
    difference: PairedBootstrap
    mcnemar: McNemar
    quadrants: tuple[Quadrant, ...]
    not_joined: dict[str, tuple[str, ...]]  # reason -> ids of our predictions
    leftover: dict[str, tuple[str, ...]]  # reason -> cached items
    notes: tuple[str, ...]
    warnings: tuple[str, ...]  # reasons to doubt the figures of the cache

    @property
    def join_rate(self) -> float:
        return self.joined / self.predictions

    def to_json(self) -> dict:
        return {**asdict(self), "join_rate": self.join_rate}


def compare_files(
    predictions: str | Path,
    cache: str | Path,
    labels: str | Path | None = None,
    model: str | None = None,
    coverage: float | None = None,
) -> Comparison:
    """`compare` for files; loads the examples of the predicted split if the cache is joined by text
    and entities.
    """
    rows = read_predictions(predictions)
    label_map = None if labels is None else read_label_map(labels)
    answers = read_cache(cache, lambda: covered_examples(rows, str(predictions)))
    return compare(rows, answers, label_map, model, coverage)


def covered_examples(rows: Sequence[Prediction], place: str) -> list[Example]:
    """Loads the whole split that `rows` are predictions for, with all entity pairs, in file order.

    Raises InputError if ids are not `DATASET/SPLIT/...` of one split of one benchmark.
    """
    dataset = rows[0].eval_dataset_name
    splits = {row.example_id.removeprefix(f"{dataset}/").split("/")[0] for row in rows}
    if (
        not dataset
        or len(splits) != 1
        or not all(row.example_id.startswith(f"{dataset}/{min(splits)}/") for row in rows)
    ):
        raise InputError(
            f"{place}: this cache covers one split of one benchmark, and example"
            f" {rows[0].example_id!r} does not say which ({dataset}/SPLIT/...); predict with --data"
            " and --split of it"
        )
    split = splits.pop()
    return load(Source(dataset=dataset, split=split, negatives=ALL_PAIRS))


def compare(
    predictions: Sequence[Prediction],
    cache: Cache,
    label_map: LabelMap | None = None,
    model: str | None = None,
    coverage: float | None = None,
) -> Comparison:
    """Joins predictions and answers, maps labels, and compares.

    Args:
      predictions: ours, each example once.
      cache: cached answers. `model` selects one of several models; of several datasets, gen_types,
        prompt_shots and prompt_styles, those of our predictions are used.
      label_map: applied to gold labels and to our predictions, and to cached labels that it lists.
        All labels that mean "no relation" count as one label.
      coverage: least share of the predictions that must join; if None, a share below
        `cache.ENOUGH` is a warning.

    Raises:
      InputError: nothing joins (shows an id and a hash of each side), or less than `coverage`;
        several models and none named; a prediction without gold label, or with a gold label that
        the map does not list; gold labels that the two sides spell differently.
    """
    answers, notes = _select(cache, predictions, model)
    joined = join(predictions, answers, cache.uncovered)
    pairs = joined.found
    if not pairs:
        raise InputError(_nothing_joined(predictions, answers, cache))
    warnings = _coverage(len(pairs), len(predictions), coverage, cache)
    rows, theirs = [row for row, _ in pairs], [answer for _, answer in pairs]
    if unlabelled := [row.example_id for row in rows if not row.relation]:
        raise InputError(
            f"{len(unlabelled):,} predictions have no gold label (first {unlabelled[0]!r}); fill"
            " the column relation"
        )

    gold = [common_gold(row, label_map) for row in rows]
    ours = [
        one_negative(
            label_map.predicted(row.generated_relation) if label_map else row.generated_relation
        )
        for row in rows
    ]
    cached = [common_label(answer.label, label_map) for answer in theirs]
    warnings += _check_gold(pairs, label_map, cache)
    if label_map and (
        strays := sum(not (is_negative(label) or label_map.is_common(label)) for label in ours)
    ):
        notes.append(
            f"{strays:,} of our predictions are not in {label_map.place}; they count as wrong"
        )

    ours_right, cached_right = _right(ours, gold), _right(cached, gold)
    schema = sorted(
        set(gold) | (set(map(one_negative, label_map.common.values())) if label_map else set())
    )
    notes += _strange_answers(theirs, cached, schema)
    return Comparison(
        ours_name=" ".join(
            dict.fromkeys(part for part in (rows[0].model_id, rows[0].tuned_dataset_name) if part)
        )
        or "ours",
        cached_name=theirs[0].model or Path(cache.place).stem,
        predictions=len(predictions),
        joined=len(rows),
        ours=score(gold, ours, schema),
        cached=score(gold, cached, schema),
        ours_f1=bootstrap_f1(gold, ours),
        cached_f1=bootstrap_f1(gold, cached),
        difference=paired_bootstrap(gold, ours, cached),
        mcnemar=mcnemar(ours_right, cached_right),
        quadrants=tuple(
            _quadrant(rows, ours_right, cached_right, ours, cached)
            for ours in (True, False)
            for cached in (True, False)
        ),
        not_joined=joined.missing,
        leftover=cache.leftover,
        notes=(*cache.notes, *notes),
        warnings=tuple(warnings),
    )


def join_answers(
    predictions: Sequence[Prediction], cache: Cache, model: str | None = None
) -> tuple[list[tuple[Prediction, Answer]], dict[str, tuple[str, ...]], list[str]]:
    """Joins predictions with cached answers: pairs, ids of predictions without an answer by reason,
    and notes on different settings.

    Raises InputError like `compare`.
    """
    answers, notes = _select(cache, predictions, model)
    joined = join(predictions, answers, cache.uncovered)
    return joined.found, joined.missing, notes


def _select(
    cache: Cache, predictions: Sequence[Prediction], model: str | None
) -> tuple[list[Answer], list[str]]:
    """Answers of one model in the setting of our predictions, and notes on different settings."""
    answers, notes = list(cache.answers), []
    for name, ours in (
        ("dataset", predictions[0].eval_dataset_name),
        ("model", model),
        ("gen_type", predictions[0].gen_type),
        ("prompt_shot", predictions[0].prompt_shot),
        ("prompt_style", predictions[0].prompt_style),
    ):
        offered = sorted({getattr(answer, name) for answer in answers} - {""})
        if name == "dataset":  # in the spelling of the cache
            ours = next((spelling for spelling in offered if same_dataset(spelling, ours)), ours)
        if name == "model" and (len(offered) > 1 or model) and model not in offered:
            choice = f"not {model!r}" if model else "and none was chosen"
            raise InputError(
                f"{cache.place}: holds answers of {', '.join(offered) or 'an unnamed model'},"
                f" {choice}; name one with --model"
            )
        if len(offered) > 1 and ours not in offered:
            advice = (
                f"but the predictions are for {ours!r}; predict in one of these settings"
                if ours
                else "and none was chosen; name one"
            )
            raise InputError(f"{cache.place}: holds {name} {', '.join(offered)}, {advice}")
        if ours in offered:
            answers = [answer for answer in answers if getattr(answer, name) == ours]
        elif offered and ours:
            notes.append(f"{name} differs: ours {ours!r}, the cache {offered[0]!r}")
    return answers, notes


def _nothing_joined(
    predictions: Sequence[Prediction], answers: Sequence[Answer], cache: Cache
) -> str:
    ours = predictions[0]
    if not answers:
        return (
            f"{cache.place}: no prediction joins the cache; it holds no answer for the split of"
            f" example {ours.example_id!r}"
        )
    theirs = answers[0]
    return (
        f"{cache.place}: no prediction joins the cache; ours is example {ours.example_id!r} (prompt"
        f" hash {ours.prompt_hash or 'none'}), the cache has example"
        f" {theirs.example_id or 'none'!r} (prompt hash {theirs.prompt_hash or 'none'}); predict on"
        " the split that the cache covers (--data and --split)"
    )


def _coverage(joined: int, predictions: int, least: float | None, cache: Cache) -> list[str]:
    """Returns a warning if the cache answers few of our examples; raises InputError if fewer than
    the user requires.
    """
    share = joined / predictions
    if least is not None and share < least:
        raise InputError(
            f"{cache.place}: answers {joined:,} of {predictions:,} predictions ({share:.1%}), less"
            f" than --coverage {least:g}; complete the cache, or lower --coverage"
        )
    if least is None and share < ENOUGH:
        return [
            f"the cache answers {joined:,} of {predictions:,} predictions ({share:.1%}); all"
            " figures are of these alone"
        ]
    return []


def _check_gold(
    pairs: Sequence[tuple[Prediction, Answer]], label_map: LabelMap | None, cache: Cache
) -> list[str]:
    """Returns a warning if gold labels differ; raises InputError if most do: then label spellings
    differ, and F1 of the cache would be wrong.
    """
    differ = gold_differs(pairs, label_map)
    if not differ:
        return []
    positive = sum(not is_negative(row.relation) for row, _ in pairs)
    if len(differ) > max(positive, 1) / 2:
        row, answer = differ[0]
        advice = (
            f"correct {label_map.place}"
            if label_map
            else "give a label map with --labels (configs/labels has some)"
        )
        ours = common_gold(row, label_map)
        raise InputError(
            f"{cache.place}: gold labels differ: {ours!r} here, {answer.gold!r} there (example"
            f" {row.example_id}); {advice}"
        )
    ids = ", ".join(row.example_id for row, _ in differ[:SHOWN])
    return [f"gold labels differ for {len(differ):,} joined examples ({ids}); ours are used"]


def _strange_answers(
    answers: Sequence[Answer], labels: Sequence[str], schema: Sequence[str]
) -> list[str]:
    """Notes on cached answers that are not labels; they count as wrong."""
    known = {normalise_label(label) for label in schema}
    outside = Counter(
        label for label in map(normalise_label, labels) if label != "none" and label not in known
    )
    notes = []
    if outside:
        few = ", ".join(f"{label[:40]!r} {count:,}" for label, count in outside.most_common(3))
        notes.append(
            f"{outside.total():,} cached answers are no label of these examples"
            f" ({few}{', ...' if len(outside) > 3 else ''})"
        )
    for status, meaning in (("refusal", "refusals"), ("truncated", "cut at the limit of tokens")):
        if count := sum(answer.status == status for answer in answers):
            notes.append(f"{count:,} cached answers are {meaning}")
    return notes


def _right(predicted: Sequence[str], gold: Sequence[str]) -> np.ndarray:
    return np.array(
        [
            normalise_label(label) == normalise_label(truth)
            for label, truth in zip(predicted, gold, strict=True)
        ]
    )


def _quadrant(
    rows: Sequence[Prediction],
    ours_right: np.ndarray,
    cached_right: np.ndarray,
    ours: bool,
    cached: bool,
) -> Quadrant:
    members = np.flatnonzero((ours_right == ours) & (cached_right == cached))
    return Quadrant(ours, cached, len(members), tuple(rows[i].example_id for i in members[:SHOWN]))


def comparison_table(comparison: Comparison) -> Group:
    """Builds the terminal tables: scores, F1 per class, who was right where, what did not join."""
    c = comparison
    scores = Table(
        title=f"{c.joined:,} of {c.predictions:,} predictions joined ({c.join_rate:.1%})",
        title_justify="left",
    )
    for column in ("system", "F1", "95% interval", "precision", "recall", "macro-F1", "accuracy"):
        scores.add_column(column, justify="left" if column == "system" else "right")
    for name, result, interval in (
        (c.ours_name, c.ours, c.ours_f1),
        (c.cached_name, c.cached, c.cached_f1),
    ):
        shares = (result.precision, result.recall, result.macro_f1, result.accuracy)
        scores.add_row(
            Text(name),
            f"{result.f1:.3f}",
            f"{interval.low:.3f}-{interval.high:.3f}",
            *(f"{share:.3f}" for share in shares),
        )

    difference, test = c.difference, c.mcnemar
    verdict = Text(
        f"Difference in F1 {difference.difference:+.3f} "
        f"(95% interval {difference.low:+.3f} to {difference.high:+.3f}, p {_p(difference.p)}). "
        f"Right where the other is wrong: ours {test.only_first:,}, cached {test.only_second:,} "
        f"(McNemar p {_p(test.p)}{', exact' if test.exact else ''})."
    )

    classes = Table(title="F1 per class", title_justify="left")
    for column in ("label", "gold", "ours", "cached"):
        classes.add_column(column, justify="left" if column == "label" else "right")
    cached_f1 = {normalise_label(row.label): row.f1 for row in c.cached.per_class}
    for row in c.ours.per_class:
        classes.add_row(
            Text(row.label),
            f"{row.support:,}",
            f"{row.f1:.3f}",
            f"{cached_f1[normalise_label(row.label)]:.3f}",
        )

    where = Table(title="Who was right where", title_justify="left")
    for column in ("ours", "cached", "examples", "such as"):
        where.add_column(column, justify="right" if column == "examples" else "left")
    for quadrant in c.quadrants:
        sides = (
            "right" if side else "wrong" for side in (quadrant.ours_right, quadrant.cached_right)
        )
        where.add_row(*sides, f"{quadrant.count:,}", Text(", ".join(quadrant.ids[:3])))

    lost = [
        f"not joined, {reason}: {len(ids):,} ({_few(ids)})" for reason, ids in c.not_joined.items()
    ]
    lost += [
        f"in the cache, {reason}: {len(items):,} ({_few(items)})"
        for reason, items in c.leftover.items()
    ]
    warnings = (Text(f"WARNING: {line}", style="bold red") for line in c.warnings)
    return Group(
        *warnings,
        scores,
        verdict,
        classes,
        where,
        *(Text(f"- {line}") for line in (*lost, *c.notes)),
    )


def _few(items: Sequence[str]) -> str:
    return "; ".join(item[:60] for item in items[:2]) + ("; ..." if len(items) > 2 else "")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
