"""Datasets of the Hugging Face hub by id, with the column logic of `columns`.

The study's copies (`Despina/conll04`, ...) and the originals of benchmarks (`benchmarks` has their
ids) need no mapping. Code of a dataset is never run: an original that needs it
(`Babelscape/rebel-dataset`) is to be downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations.benchmarks import COPIES, ORIGINALS
from jaxre.relations.columns import read_records, resolve
from jaxre.relations.files import Record, check_split
from jaxre.relations.schema import Reading

if TYPE_CHECKING:
    import datasets

PREFIX = "hub:"
# SemEval by split: the number of items and of the first one. The hub's rows are taken for the items
# in file order, which they do not number (not checked against the hub itself).
NUMBERED = {"SemEvalWorkshop/sem_eval_2010_task_8": {"train": (8000, 1), "test": (2717, 8001)}}


def read_hub(source: config.Source, labelled: bool = True) -> Reading:
    """One split of a hub dataset, in order, with ids such as `Despina/conll04/train/17`.

    The copy or original of a benchmark gives examples of that benchmark, in name and domain; the
    whole original of SemEval even the ids of its files. Where `columns` is given, or the original
    has not its own columns, rows are read by column.

    An entity that does not occur in its text is no error here: the study's copies name some
    entities in other words than the text, and a reader of a published set cannot mend it. Such an
    example has no span, and a prompt does not mark it (`sources.unlocated` lists them).

    Args:
      source: its dataset is `hub:` with OWNER/NAME, or with a local folder that `datasets` can
        load; with a subset where the dataset has several.
      labelled: False lets a dataset without relations through (relation "").
    Raises:
      InputError: the hub cannot be reached; no such dataset, subset or split; columns as in
        `columns`.
    """
    place, name = source.dataset, source.dataset.removeprefix(PREFIX)
    split, subset, key = source.split, source.subset, source.columns_key
    known = COPIES.get(name) or ORIGINALS.get(name)
    nested = (
        known is not None
        and known.rows is not None
        and name == known.original
        and not source.columns
    )
    if nested and (known.whole or known.files):
        check_split(place, split, known.splits)
    files = {"data_files": {split: known.files[split]}} if nested and known.files else {}
    mend = f" to JAXRE_DATA/{known.folder} and read {known.name}" if known else ""
    splits = download(place, subset, mend, **files)
    table = splits[check_split(place, "train" if nested and known.whole else split, list(splits))]
    if len(table) == 0:
        raise InputError(f"{place}: split {split} has no records; choose another split")
    records = _records(table, f"{place}/{split}")
    prefix = f"{name}/{subset}" if subset else name
    if nested:
        return known.rows(records, split, prefix, source)
    column = resolve(source.columns, table.column_names, place, labelled, key)
    dataset, domain = (
        (known.name, known.domain) if known and name not in NUMBERED else (prefix, "general")
    )
    count, first = NUMBERED.get(name, {}).get(split, (None, 1))
    # The benchmark only where the rows are its items: others would pass for them by their numbers.
    if len(table) == count and "id" not in column:
        column, dataset, prefix = {**column, "id": "id"}, known.name, known.name
        records = (
            (at, {**record, "id": number}) for number, (at, record) in enumerate(records, first)
        )
    return Reading(
        read_records(
            records,
            column,
            dataset,
            split,
            labelled,
            must_occur=False,
            key=key,
            prefix=prefix,
            domain=domain,
        )
    )


def download(
    place: str, subset: str | None = None, files_to: str = "", **options: object
) -> datasets.DatasetDict:
    """The splits of a hub dataset, or of a local folder after the prefix.

    Args:
      place: `hub:` with OWNER/NAME.
      files_to: where its files are to be downloaded to, if it is one that needs code of its own.
      options: of `datasets.load_dataset`.
    Raises:
      InputError: the hub cannot be reached; no such dataset or subset; what `datasets` cannot load.
    """
    # Imported here: it takes most of a second, which no other command should pay.
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(place.removeprefix(PREFIX), subset, **options)
    except ConnectionError as error:
        raise InputError(
            f"{place}: the hub cannot be reached ({_one_line(error)}); connect, or give a"
            " downloaded file"
        ) from None
    except DatasetNotFoundError:
        raise InputError(
            f"{place}: no such dataset, or it is private; check OWNER/NAME, or log in with `hf auth"
            " login`"
        ) from None
    # Anything else too: time-outs come as exceptions of whichever HTTP library the hub client has
    # this year.
    except Exception as error:
        mend = "choose another subset" if "config" in str(error).lower() else "check OWNER/NAME"
        if "scripts are no longer supported" in str(error):
            mend = f"its code is never run; download its files{files_to}"
        raise InputError(f"{place}: cannot be loaded: {_one_line(error)}; {mend}") from error


def _records(table: datasets.Dataset, place: str) -> Iterator[Record]:
    """The rows, with class numbers as their names (-1, the hub's "unknown", as None)."""
    names = {
        key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")
    }
    for number, record in enumerate(table, start=1):
        named = {
            key: of[record[key]] if record[key] is not None and record[key] >= 0 else None
            for key, of in names.items()
        }
        yield f"{place}: row {number}", {**record, **named}


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
