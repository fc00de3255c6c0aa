"""Checks a cache against the data that it should cover: its coverage, gold labels and prompts.

check = check_cache(read_cache(path), examples, labels)
check.problems                       # sentences; empty if the cache can be compared
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.errors import InputError
from jaxre.evaluation.frontier.cache import (
    DISAGREE,
    ENOUGH,
    Answer,
    Cache,
    gold_differs,
    join,
    same_dataset,
)
from jaxre.evaluation.metrics.scores import MALFORMED_CHARACTERS
from jaxre.evaluation.predictions import GenType, Prediction
from jaxre.relations.label_map import LabelMap
from jaxre.relations.schema import Example, hash_prompt, normalise_label

SHOWN = 3


@dataclass(frozen=True)
class SettingCheck:
    """Answers of one model in one setting. Ids are those of examples; outside: label -> count, for
    labels outside of the schema.
    """

    model: str
    gen_type: str
    prompt_shot: str
    rows: int
    examples: int
    answered: int
    missing: dict[str, tuple[str, ...]]  # reason -> ids
    gold_differs: tuple[str, ...]
    prompt_differs: tuple[str, ...]
    prompts_checked: int
    strangers: int  # rows that belong to no example
    outside: dict[str, int]
    malformed: int
    refusals: int
    truncated: int

    @property
    def coverage(self) -> float:
        return self.answered / self.examples

    @property
    def name(self) -> str:
        shots = self.prompt_shot and f"{self.prompt_shot}-shot"
        return ", ".join(filter(None, (self.model, self.gen_type, shots))) or "the cache"

    def problems(self, least: float) -> list[str]:
        """Reasons against a comparison. least: the share of examples that must have an answer."""
        problems = []
        if self.coverage < least:
            problems.append(
                f"answers {self.answered:,} of {self.examples:,} examples ({self.coverage:.1%}),"
                f" less than {least:.0%}"
            )
        for ids, fault in (
            (self.missing.get(DISAGREE, ()), "different answers for one example"),
            (self.gold_differs, "another gold label"),
            (self.prompt_differs, "another prompt"),
        ):
            if ids:
                problems.append(
                    f"has {fault} in {len(ids):,} cases"
                    f" ({', '.join(ids[:SHOWN])}{', ...' if len(ids) > SHOWN else ''})"
                )
        if self.gen_type and self.gen_type not in get_args(GenType):
            problems.append(
                f"has the unknown gen_type {self.gen_type!r}; the study's are"
                f" {' and '.join(get_args(GenType))}"
            )
        if self.prompt_shot and not self.prompt_shot.isdigit():
            problems.append(f"has the unknown prompt_shot {self.prompt_shot!r}; write a number")
        return [f"{self.name} {problem}" for problem in problems]


@dataclass(frozen=True)
class CacheCheck:
    """All settings of a cache, for one dataset. problems: sentences; empty if the cache can be
    compared.
    """

    place: str
    dataset: str
    settings: tuple[SettingCheck, ...]
    problems: tuple[str, ...]
    leftover: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def to_json(self) -> dict:
        return {
            **asdict(self),
            "settings": [
                {**asdict(setting), "coverage": setting.coverage} for setting in self.settings
            ],
        }


def check_cache(
    cache: Cache,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    prompts: Mapping[str, str] | None = None,
    setting: tuple[str, str] | None = None,
    label_map: LabelMap | None = None,
    least: float = ENOUGH,
) -> CacheCheck:
    """Checks every setting of a cache against all examples of a split.

    Args:
      labels: the schema, in our spelling.
      prompts: example id -> its prompt in `setting`, (gen_type, prompt_shot). An answer that states
        its prompt or prompt hash must have this one. If the source states its own prompt hash
        (`Example.prompt_hash`), answers must have that hash, in all settings.
      label_map: as in `compare`.
      least: the share of examples that must have an answer.

    Raises:
      InputError: no answers, or none for the dataset of the examples; a gold label that the map
        does not list.
    """
    dataset = examples[0].dataset
    answers, notes = _of_dataset(cache, dataset)
    allowed = {normalise_label(label) for label in labels} | (
        {normalise_label(label) for label in label_map.common.values()} if label_map else set()
    )
    groups: dict[tuple[str, str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.model, answer.gen_type, answer.prompt_shot].append(answer)
    settings = []
    for (model, gen_type, shot), group in sorted(groups.items()):
        same_setting = setting is None or (
            gen_type in ("", setting[0]) and shot in ("", setting[1])
        )
        expected = prompts if prompts and same_setting else {}
        if prompts and not same_setting:
            notes.append(
                f"{gen_type}, {shot}-shot: the config asks {setting[0]}, {setting[1]}-shot, so its"
                " prompts are not compared"
            )
        rows = [
            Prediction(
                example.id,
                example.relation,
                "",
                prompt=expected.get(example.id, ""),
                prompt_hash=_hash(example, expected),
            )
            for example in examples
        ]
        joined = join(rows, group, cache.uncovered)
        labelled = [(row, answer) for row, answer in joined.found if row.relation]
        cached_labels = [
            normalise_label(label_map.cached(answer.label) if label_map else answer.label)
            for _, answer in joined.found
        ]
        settings.append(
            SettingCheck(
                model=model,
                gen_type=gen_type,
                prompt_shot=shot,
                rows=len(group),
                examples=len(examples),
                answered=len(joined.found),
                missing=joined.missing,
                gold_differs=tuple(row.example_id for row, _ in gold_differs(labelled, label_map)),
                prompt_differs=tuple(
                    row.example_id for row, answer in joined.found if _another_prompt(row, answer)
                ),
                prompts_checked=sum(
                    bool(row.prompt_hash and answer.prompt_hash) for row, answer in joined.found
                ),
                strangers=len(joined.strangers),
                outside=dict(
                    Counter(label for label in cached_labels if label not in allowed).most_common()
                ),
                malformed=sum(len(label) > MALFORMED_CHARACTERS for label in cached_labels),
                refusals=sum(answer.status == "refusal" for _, answer in joined.found),
                truncated=sum(answer.status == "truncated" for _, answer in joined.found),
            )
        )
    problems = tuple(problem for checked in settings for problem in checked.problems(least))
    return CacheCheck(
        cache.place, dataset, tuple(settings), problems, cache.leftover, (*cache.notes, *notes)
    )


def _of_dataset(cache: Cache, dataset: str) -> tuple[list[Answer], list[str]]:
    offered = sorted({answer.dataset for answer in cache.answers} - {""})
    ours = [name for name in offered if same_dataset(name, dataset)]
    if ours:
        return [answer for answer in cache.answers if answer.dataset in (*ours, "")], []
    if len(offered) > 1 or not cache.answers:
        raise InputError(
            f"{cache.place}: holds no answer for {dataset!r} (but for"
            f" {', '.join(offered) or 'nothing'}); name its data with --data"
        )
    return list(cache.answers), (
        [f"dataset differs: ours {dataset!r}, the cache {offered[0]!r}"] if offered else []
    )


def _hash(example: Example, prompts: Mapping[str, str]) -> str:
    prompt = prompts.get(example.id)
    return example.prompt_hash or ("" if prompt is None else hash_prompt(prompt))


def _another_prompt(row: Prediction, answer: Answer) -> bool:
    other_hash = row.prompt_hash and answer.prompt_hash and row.prompt_hash != answer.prompt_hash
    return bool(other_hash or (row.prompt and answer.prompt and row.prompt != answer.prompt))


def check_table(check: CacheCheck) -> Group:
    """Builds the terminal table: one line per setting, then problems and notes."""
    table = Table(title=Text(f"{check.place}: answers for {check.dataset}"), title_justify="left")
    for column in ("setting", "answered", "coverage", "gold differs", "prompt differs", "no label"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    lines = []
    for setting in check.settings:
        table.add_row(
            Text(setting.name),
            f"{setting.answered:,} of {setting.examples:,}",
            f"{setting.coverage:.1%}",
            f"{len(setting.gold_differs):,}",
            f"{len(setting.prompt_differs):,} of {setting.prompts_checked:,}"
            if setting.prompts_checked
            else "not checked",
            f"{sum(setting.outside.values()):,}",
        )
        notes = [
            f"{reason}: {len(ids):,} ({', '.join(ids[:SHOWN])})"
            for reason, ids in setting.missing.items()
        ]
        if setting.outside:
            few = ", ".join(
                f"{label[:40]!r} {number:,}"
                for label, number in list(setting.outside.items())[:SHOWN]
            )
            notes.append(f"outside the schema: {few}")
        for count, fact in (
            (setting.strangers, "rows belong to no example"),
            (setting.malformed, f"answers are longer than {MALFORMED_CHARACTERS} characters"),
            (setting.refusals, "answers are refusals"),
            (setting.truncated, "answers were cut"),
        ):
            if count:
                notes.append(f"{count:,} {fact}")
        lines += [f"{setting.name}: {note}" for note in notes]
    lines += [f"in the cache, {reason}: {len(items):,}" for reason, items in check.leftover.items()]
    problems = (Text(f"PROBLEM: {problem}", style="bold red") for problem in check.problems)
    return Group(table, *problems, *(Text(f"- {line}") for line in (*lines, *check.notes)))
