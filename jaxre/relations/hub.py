"""Datasets of the Hugging Face hub by id, with the column logic of `columns`.

The study's copies (`Despina/conll04`, ...) and the original SemEval
(`SemEvalWorkshop/sem_eval_2010_task_8`: a sentence with `<e1>` tags, the relation as a number with
names) need no mapping. Code of a dataset is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxre.errors import InputError
from jaxre.relations import semeval
from jaxre.relations.columns import KEY, Columns, read_records, resolve
from jaxre.relations.files import check_split
from jaxre.relations.schema import Example

if TYPE_CHECKING:
    import datasets

PREFIX = "hub:"
# Benchmarks that we read from files too: their name there, and by split the number of items and of the first one. The hub's
# rows are taken for the items in file order, which they do not number (not checked against the hub itself).
KNOWN = {"SemEvalWorkshop/sem_eval_2010_task_8": (semeval.NAME, {"train": (8000, 1), "test": (2717, 8001)})}


def read_hub(
    name: str,
    split: str | None,
    subset: str | None = None,
    columns: Columns | None = None,
    labelled: bool = True,
    key: str = KEY,
) -> list[Example]:
    """One split of a hub dataset, in order, with ids such as `Despina/conll04/train/17`.

    A benchmark that we read from files too gives the same examples, ids and dataset name included.

    An entity that does not occur in its text is no error here: the study's copies name some
    entities in other words than the text, and a reader of a published set cannot mend it. Such an
    example has no span, and a prompt does not mark it (`sources.unlocated` lists them).

    Args:
      name: OWNER/NAME, or a local folder that `datasets` can load.
      split: of the dataset.
      subset: its configuration, where it has several.
      columns: our field -> column, where the names differ.
      labelled: False lets a dataset without relations through (relation "").
      key: what a user writes for `columns`, for errors.
    Raises:
      InputError: the hub cannot be reached; no such dataset, subset or split; columns as in `columns`.
    """
    # Imported here: it takes most of a second, which no other command should pay.
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    place = f"{PREFIX}{name}"
    try:
        splits = datasets.load_dataset(name, subset)
    except ConnectionError as error:
        raise InputError(f"{place}: the hub cannot be reached ({_one_line(error)}); connect, or give a downloaded file") from None
    except DatasetNotFoundError:
        raise InputError(f"{place}: no such dataset, or it is private; check OWNER/NAME, or log in with `hf auth login`") from None
    # Anything else too: time-outs come as exceptions of whichever HTTP library the hub client has this year.
    except Exception as error:
        mend = "choose another subset" if "config" in str(error).lower() else "check OWNER/NAME"
        raise InputError(f"{place}: cannot be loaded: {_one_line(error)}; {mend}") from error
    table = splits[check_split(place, split, list(splits))]
    if len(table) == 0:
        raise InputError(f"{place}: split {split} has no records; choose another split")
    column = resolve(columns or {}, table.column_names, place, labelled, key)
    known, items = KNOWN.get(name, (None, {}))
    count, first = items.get(split, (None, 1))
    # The benchmark only where the rows are its items: others would pass for them by their numbers.
    same = len(table) == count and "id" not in column
    dataset = known if same else f"{name}/{subset}" if subset else name
    records = _records(table, f"{place}/{split}")
    if same:
        column = {**column, "id": "id"}
        records = ((at, {**record, "id": number}) for number, (at, record) in enumerate(records, first))
    return read_records(records, column, dataset, split, labelled, must_occur=False, key=key)


def _records(table: datasets.Dataset, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows, with class numbers as their names (-1, the hub's "unknown", as None)."""
    names = {key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")}
    for number, record in enumerate(table, start=1):
        named = {key: of[record[key]] if record[key] is not None and record[key] >= 0 else None for key, of in names.items()}
        yield f"{place}: row {number}", {**record, **named}


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
