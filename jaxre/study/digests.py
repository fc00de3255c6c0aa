"""Digests of the inputs of a study's steps: a step is done if its record has the same digest.

A digest covers settings (those that differ from their default, so that a new setting of a later
version changes nothing), examples as the readers return them, labels, the weights that a run starts
from, and the digest of the run before it. It does not cover our code: a changed message would make
a study of days start again. The digest of the code is in each step's record instead, and the plan
counts the finished steps that other code made; to repeat a step, delete its file in `steps/`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jaxre_kernels

from jaxre.checkpoints.source import resolve_model
from jaxre.code_digest import code_digest
from jaxre.config import Config, Source
from jaxre.data.tokens import read_texts
from jaxre.errors import InputError
from jaxre.evaluation.frontier.cache import Cache
from jaxre.evaluation.frontier.read import read_cache
from jaxre.relations import mixtures, sources
from jaxre.relations.hub import PREFIX
from jaxre.relations.schema import Example, Schema
from jaxre.study.grid import Run
from jaxre.study.settings import StudyDataset
from jaxre.training.run_folder import FREE_ON_RESUME

FORMAT = 1  # part of every digest: raise it when what a step leaves changes its meaning
CHUNKS, CHUNK = 64, 2**16  # of a large file: number and bytes of the evenly spread chunks read


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


@dataclass
class Read:
    """Cache of the examples of a study's sources and of the digests of its models; errors are
    cached too.

    datasets: those of the study's settings. results: values and errors by key.
    """

    datasets: dict[str, StudyDataset]
    results: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, read: Callable[[], Any]) -> Any:
        """Returns or raises the result of the first call of `read` for this key."""
        if key not in self.results:
            try:
                self.results[key] = read()
            except InputError as error:
                self.results[key] = error
        if isinstance(self.results[key], InputError):
            raise self.results[key]
        return self.results[key]

    def examples(self, source: Source) -> list[Example]:
        """Raises InputError as `sources.load`."""
        return self.once(f"examples {source.model_dump_json()}", lambda: sources.load(source))

    def digest(self, source: Source) -> str:
        """Digest of the examples of a source."""
        return self.once(
            f"digest {source.model_dump_json()}", lambda: _digest_of_rows(self.examples(source))
        )

    def model(self, path: str) -> str:
        """`model_digest`."""
        return self.once(f"model {path}", lambda: model_digest(path))

    def cache(self, place: str, examples: Callable[[], list[Example]]) -> Cache:
        """`read_cache`; a cache on the hub, which needs no examples, is read once."""
        if place.startswith(PREFIX):
            return self.once(f"cache {place}", lambda: read_cache(place))
        return read_cache(place, examples)

    def cache_digest(self, place: str) -> str:
        """Digest of a cache's file, or of the answers that are on the hub now."""
        if not place.startswith(PREFIX):
            return file_digest(Path(place))
        return self.once(
            f"digest {place}", lambda: _digest_of_rows(self.cache(place, list).answers)
        )

    def test(self, dataset: str) -> list[Example]:
        """The test examples of a dataset. Raises InputError also where they carry the name of
        another dataset.
        """
        examples = self.examples(self.datasets[dataset].test)
        if examples[0].dataset != dataset:
            raise InputError(
                f"datasets.{dataset}: its examples are of the dataset {examples[0].dataset!r}; call"
                " it so in the study"
            )
        return examples

    def labels(self, dataset: str) -> tuple[str, ...]:
        """The schema of a dataset, sorted."""
        schema = self.datasets[dataset].schema_source
        if isinstance(schema, Source):
            return Schema.of(self.examples(schema)).labels
        return tuple(sorted(schema))


def _digest_of_rows(rows: Iterable[Any]) -> str:
    """Digest of the field values of dataclass instances."""
    return digest([list(asdict(row).values()) for row in rows])


def run_digest(run: Run, read: Read, before: str | None) -> str:
    """Digest of a training run.

    Args:
      before: the digest of the run that it starts from; None if it starts from `model.path`.

    Raises:
      InputError: examples, text or a base that cannot be read.
    """
    config, text = run.config, run.config.data.text
    settings = without(
        config.model_dump(mode="json", exclude_defaults=True),
        {"name", "model.path", "data.text", *FREE_ON_RESUME},
    )
    return digest(
        settings,
        before or read.model(config.model.path),
        [read.digest(source) for source in sources_of(config)],
        None if text is None else digest(text.model_dump(mode="json"), read_texts(text)),
    )


def sources_of(config: Config) -> list[Source]:
    """The sources of a run's examples, labels and texts."""
    data = config.data
    candidates = (
        *mixtures.sources_of(data.train),
        *mixtures.sources_of(data.validation),
        *(data.labels if isinstance(data.labels, dict) else {}).values(),
        *(data.text.sources if data.text else ()),
    )
    return [source for source in candidates if isinstance(source, Source)]


def without(tree: dict[str, Any], dropped: Iterable[str], place: str = "") -> dict[str, Any]:
    """The settings except those with the dotted names `dropped`."""
    return {
        name: without(value, dropped, f"{place}{name}.") if isinstance(value, dict) else value
        for name, value in tree.items()
        if place + name not in dropped
    }


def file_digest(path: Path) -> str:
    """Digest of the bytes of a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); correct its path in the study's config"
        ) from None


def model_digest(path: str) -> str:
    """Digest of the files of a model folder: small files whole, of large ones the size and evenly
    spread chunks. Raises InputError.
    """
    folder = resolve_model(path)
    sha256 = hashlib.sha256()
    for file in sorted(
        file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")
    ):
        size = file.stat().st_size
        sha256.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= CHUNKS * CHUNK:
                sha256.update(opened.read())
                continue
            for number in range(CHUNKS):
                opened.seek(number * (size - CHUNK) // (CHUNKS - 1))
                sha256.update(opened.read(CHUNK))
    return sha256.hexdigest()


@functools.cache
def own_code() -> str:
    """Digest of our own source files."""
    packages = (Path(__file__).parents[1], Path(jaxre_kernels.__file__).parent)
    return code_digest(path for package in packages for path in sorted(package.rglob("*.py")))
