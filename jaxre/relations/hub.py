"""Reads datasets of the Hugging Face hub by id, with the column logic of `columns`.

The study's copies (`Despina/conll04`, ...) and the originals of benchmarks (`benchmarks` has their
ids) need no mapping. Code of a dataset is never run: the files of an original that needs it
(`Babelscape/rebel-dataset`) must be downloaded.
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
# SemEval by split: the number of items, and the id of the first item. The hub's rows have no ids;
# we assume that they are the items in file order (not checked against the hub itself).
NUMBERED = {"SemEvalWorkshop/sem_eval_2010_task_8": {"train": (8000, 1), "test": (2717, 8001)}}


def read_hub(source: config.Source, labelled: bool = True) -> Reading:
    """Reads a split of a hub dataset, in order, with ids such as `Despina/conll04/train/17`.

    Examples of a benchmark's copy or original carry the name and domain of the benchmark; those of
    the complete original of SemEval also the ids of its files. With `columns`, or for originals
    with the usual columns, rows are read by column.

    An entity that does not occur in its text is no error here: the study's copies name some
    entities in other words than the text, and a user cannot correct a published set. Such an
    example has no span, and a prompt does not mark it (`sources.unlocated` lists them).

    Args:
      source: its dataset is `hub:` with OWNER/NAME, or with a local folder that `datasets` can
        load; with a subset where the dataset has several.
      labelled: False accepts a dataset without relations (relation "").
    Raises:
      InputError: the hub cannot be reached; no such dataset, subset or split; columns as in
        `columns`.
    """
    place, name = source.dataset, source.dataset.removeprefix(PREFIX)
    split, subset, key = source.split, source.subset, source.columns_key
    benchmark = COPIES.get(name) or ORIGINALS.get(name)
    # An original with rows of its own shape, read by the benchmark's reader.
    original = benchmark if name in ORIGINALS and benchmark.rows and not source.columns else None
    if original and (original.whole or original.files):
        check_split(place, split, original.splits)
    files = {"data_files": {split: original.files[split]}} if original and original.files else {}
    advice = f" to JAXRE_DATA/{benchmark.folder} and read {benchmark.name}" if benchmark else ""
    splits = download(place, subset, advice, **files)
    hub_split = "train" if original and original.whole else split
    table = splits[check_split(place, hub_split, list(splits))]
    if len(table) == 0:
        raise InputError(f"{place}: split {split} has no records; choose another split")
    records = _records(table, f"{place}/{split}")
    prefix = f"{name}/{subset}" if subset else name
    if original:
        return original.rows(records, split, prefix, source)
    column = resolve(source.columns, table.column_names, place, labelled, key)
    dataset, domain = prefix, "general"
    if benchmark and name not in NUMBERED:
        dataset, domain = benchmark.name, benchmark.domain
    count, first = NUMBERED.get(name, {}).get(split, (None, 1))
    # Numbered as the benchmark's items only if the count fits: other rows would get wrong ids.
    if len(table) == count and "id" not in column:
        column, dataset, prefix = {**column, "id": "id"}, benchmark.name, benchmark.name
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
    """Downloads the splits of a hub dataset, or loads those of a local folder.

    Args:
      place: `hub:` with OWNER/NAME or the folder.
      files_to: advice for a dataset that needs its own code: the target of a manual download.
      options: of `datasets.load_dataset`.
    Raises:
      InputError: the hub cannot be reached; no such dataset or subset; `datasets` cannot load it.
    """
    # Imported here because the import takes most of a second.
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
    # Any other exception too: those of time-outs depend on the HTTP library of the hub client.
    except Exception as error:
        advice = "choose another subset" if "config" in str(error).lower() else "check OWNER/NAME"
        if "scripts are no longer supported" in str(error):
            advice = f"its code is never run; download its files{files_to}"
        raise InputError(f"{place}: cannot be loaded: {_one_line(error)}; {advice}") from error


def _records(table: datasets.Dataset, place: str) -> Iterator[Record]:
    """The rows, with class numbers as their names (-1, the hub's "unknown", as None)."""
    names = {
        key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")
    }
    for number, record in enumerate(table, start=1):
        named = {
            key: classes[record[key]] if record[key] is not None and record[key] >= 0 else None
            for key, classes in names.items()
        }
        yield f"{place}: row {number}", {**record, **named}


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
