"""The benchmarks by name: folder, reader, domain, and permission to show their sentences.

    BENCHMARKS["gids"].read(folder, source)

A benchmark is read from its original files below the data folder, from the original on the hub
(`original`: its rows have the format of the files, or another known one), or from the study's copy
on the hub (`copy`: the columns of `columns`). Examples of a copy carry the name and the domain of
the benchmark; their ids begin with the id of the copy, since its rows are numbered differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations import (
    biographical,
    conll04,
    gids,
    nyt,
    pg_fiction,
    re_docred,
    rebel,
    semeval,
    tacred,
)
from jaxre.relations.draws import SPLITS
from jaxre.relations.files import Record, split_file
from jaxre.relations.schema import Domain, Reading
from jaxre.relations.tables import read_table

FACTS = "facts"

# rows, split, prefix of ids, source
Rows = Callable[[Iterable[Record], str, str, config.Source], Reading]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    folder: below the data folder (`config.data_root`); None for the shipped corpus. read: reads the
    examples of a source from the folder. open_licence: True if its sentences may be shown in
    public. copy, original: ids on the hub. rows: reads the rows of the original, None if its
    columns are the usual ones. whole: the original is one split, which `rows` divides. files: split
    -> file of the original, where the hub would combine several files into one split.
    """

    name: str
    folder: str | None
    splits: tuple[str, ...]
    read: Callable[[Path, config.Source], Reading]
    domain: Domain = "general"
    open_licence: bool = False
    copy: str | None = None
    original: str | None = None
    rows: Rows | None = None
    whole: bool = False
    files: Mapping[str, str] | None = None

    @property
    def path(self) -> Path:
        """Folder of its files."""
        return config.shipped("corpus") if self.folder is None else config.data_root() / self.folder


def _read_facts(folder: Path, source: config.Source) -> Reading:
    files = {path.stem: path.name for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise InputError(f"{folder}: the shipped corpus is missing; install jaxre again")
    return Reading(
        read_table(
            split_file(folder, FACTS, source.split, files), dataset=FACTS, split=source.split
        )
    )


_ALL = (
    Benchmark(FACTS, None, SPLITS, _read_facts, open_licence=True),
    Benchmark(
        semeval.NAME,
        "semeval2010_task8",
        tuple(semeval.FILES),
        lambda folder, source: Reading(semeval.read_semeval(folder, source.split)),
        open_licence=True,
        copy="Despina/semeval2010_task8",
        original="SemEvalWorkshop/sem_eval_2010_task_8",
    ),
    Benchmark(
        conll04.UNIFIED,
        "conll04",
        tuple(conll04.UNIFIED_FILES),
        lambda folder, source: Reading(
            conll04.read_conll04(folder, source.split, source.negatives)
        ),
        copy="Despina/conll04",
        original="DFKI-SLT/conll04",
        rows=lambda rows, split, prefix, source: Reading(
            conll04.read_conll04_rows(rows, split, prefix, source.negatives)
        ),
    ),
    Benchmark(
        conll04.MULTIHEAD,
        "conll04",
        tuple(conll04.MULTIHEAD_FILES),
        lambda folder, source: Reading(
            conll04.read_conll04_multihead(folder, source.split, source.negatives)
        ),
    ),
    Benchmark(
        nyt.NYT11,
        "nyt11",
        tuple(nyt.NYT11_FILES),
        lambda folder, source: nyt.read_nyt11(folder, source.split),
        copy="Despina/nyt_11",
    ),
    Benchmark(
        nyt.HOFFMANN,
        "nyt",
        tuple(nyt.HOFFMANN_FILES),
        lambda folder, source: nyt.read_hoffmann(folder, source.split),
    ),
    Benchmark(
        nyt.NYT24,
        "nyt",
        tuple(nyt.NYT24_FILES),
        lambda folder, source: nyt.read_nyt24(folder, source.split),
    ),
    Benchmark(
        gids.NAME,
        "gids",
        tuple(gids.FILES),
        lambda folder, source: gids.read_gids(folder, source.split),
        copy="Despina/gids",
        original="DFKI-SLT/gids",
        rows=lambda rows, split, prefix, source: gids.read_gids_rows(rows, split, prefix),
    ),
    Benchmark(
        re_docred.NAME,
        "re_docred",
        tuple(re_docred.FILES),
        lambda folder, source: re_docred.read_re_docred(
            folder, source.split, source.negatives, source.window
        ),
        copy="Despina/re-docred",
        original="tonytan48/Re-DocRED",
        rows=lambda rows, split, prefix, source: re_docred.read_re_docred_rows(
            rows, split, prefix, source.negatives, source.window
        ),
    ),
    Benchmark(
        rebel.NAME,
        "rebel",
        tuple(rebel.FILES),
        lambda folder, source: rebel.read_rebel(folder, source.split),
        copy="Despina/rebel-dataset",
        original="Babelscape/rebel-dataset",
        rows=lambda rows, split, prefix, source: rebel.read_rebel_rows(rows, split, prefix),
    ),
    Benchmark(
        tacred.NAME,
        "tacred",
        tuple(tacred.FILES),
        lambda folder, source: tacred.read_tacred(folder, source.split),
        copy="Despina/tacred",
    ),
    Benchmark(
        biographical.NAME,
        "biographical",
        tuple(biographical.FILES),
        lambda folder, source: biographical.read_biographical(folder, source.split),
        domain=biographical.DOMAIN,
        copy="Despina/biographical",
        original="plumaj/biographical",
        rows=lambda rows, split, prefix, source: biographical.read_biographical_rows(
            rows, split, prefix
        ),
        files={split: f"en/{name}" for split, name in biographical.FILES.items()},
    ),
    Benchmark(
        pg_fiction.NAME,
        "pg_fiction",
        SPLITS,
        lambda folder, source: pg_fiction.read_pg_fiction(folder, source.split),
        domain=pg_fiction.DOMAIN,
        copy="Despina/project-gutenberg-fiction-relations",
        original="Despina/project_gutenberg",
        rows=lambda rows, split, prefix, source: pg_fiction.read_pg_fiction_rows(
            rows, split, prefix
        ),
        whole=True,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
COPIES = {benchmark.copy: benchmark for benchmark in _ALL if benchmark.copy}
ORIGINALS = {benchmark.original: benchmark for benchmark in _ALL if benchmark.original}


def open_licence(name: str) -> bool:
    """True if sentences of a dataset may be shown in public; False for datasets that are not
    benchmarks, since their licence is unknown.
    """
    return name in BENCHMARKS and BENCHMARKS[name].open_licence
