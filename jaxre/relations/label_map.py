"""Label maps unify two spellings of a schema: `our label -> common label`, in YAML, JSON or CSV.

labels = read_label_map("configs/labels/semeval-undirected.yaml")
labels.gold("Cause-Effect(e2,e1)", "test/8001")            # "Cause Effect"
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxre.config import parse_yaml
from jaxre.errors import InputError
from jaxre.relations.schema import normalise_label


@dataclass(frozen=True)
class LabelMap:
    """`common` maps each of our labels, normalised, to the common label."""

    place: str
    common: dict[str, str]

    def gold(self, label: str, example_id: str) -> str:
        """The common label of a gold label. Raises InputError if the map does not list it."""
        try:
            return self.common[normalise_label(label)]
        except KeyError:
            raise InputError(
                f"{self.place}: no entry for the label {label!r} (example {example_id}); add"
                f" `{label}: COMMON`"
            ) from None

    def predicted(self, label: str) -> str:
        """The common label of a predicted label; unlisted labels stay unchanged."""
        return self.common.get(normalise_label(label), label)

    def cached(self, label: str) -> str:
        """The common label of a cached label, which may already be a common one; unlisted labels
        stay unchanged.
        """
        return label if self.is_common(label) else self.predicted(label)

    def is_common(self, label: str) -> bool:
        """True if the map has this common label."""
        return normalise_label(label) in self._common_names

    @cached_property
    def _common_names(self) -> frozenset[str]:
        return frozenset(normalise_label(common) for common in self.common.values())


def read_label_map(path: str | Path) -> LabelMap:
    """Reads a label map: a YAML or JSON mapping, or a CSV file of two columns without header.

    Raises InputError: no such file, not a mapping of labels to labels, a label with two entries.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such label map; correct its path (configs/labels has some)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not UTF-8 text; a label map is YAML, JSON or two-column CSV"
        ) from None
    pairs = _csv_pairs(text, path) if path.suffix == ".csv" else _yaml_pairs(text, path)
    if not pairs:
        raise InputError(
            f"{path}: the label map is empty; write one `our label: common label` per line"
        )
    common: dict[str, str] = {}
    for ours, theirs in pairs:
        if common.setdefault(normalise_label(ours), theirs) != theirs:
            raise InputError(f"{path}: the label {ours!r} has two entries; keep one")
    return LabelMap(str(path), common)


def _yaml_pairs(text: str, path: Path) -> list[tuple[str, str]]:
    tree = parse_yaml(text, str(path))  # JSON is YAML
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a label map; write one `our label: common label` per line")
    for ours, theirs in tree.items():
        for label in (ours, theirs):
            if not isinstance(label, str | int | float) or isinstance(label, bool):
                raise InputError(
                    f"{path}: {label!r} is not a label; a label map is a flat mapping, quote labels"
                    " such as 'true' and 'null'"
                )
    return [(str(ours), str(theirs)) for ours, theirs in tree.items()]


def _csv_pairs(text: str, path: Path) -> list[tuple[str, str]]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise InputError(
                f"{path}:{number}: {len(row)} cells; write `our label,common label` and quote"
                " labels that hold commas"
            )
    return [(ours, theirs) for ours, theirs in rows]
