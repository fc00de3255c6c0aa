"""What each step of a study depends on, as a digest: a step whose digest is that of its record is
done.

A digest covers settings (those that differ from their default, so that a new one of a later version
changes nothing), examples as they were read (so also what the readers do to them), labels, the
weights that a run starts from, and the digest of the run that comes before. It does not cover our
code: a study of days would start again because of a changed message. The digest of the code is
written into each step's record instead, and a study tells which of its finished steps were made by
other code; to make one again, delete its file in `steps/`.
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
from jaxre.config import Config, Mixture, Source
from jaxre.errors import InputError
from jaxre.evaluation.cache import Cache
from jaxre.evaluation.frontier import read_cache
from jaxre.relations import sources
from jaxre.relations.hub import PREFIX
from jaxre.relations.schema import Example, Schema
from jaxre.study.grid import Run
from jaxre.study.settings import StudyDataset
from jaxre.training.run_folder import FREE_ON_RESUME

FORMAT = 1  # part of every digest: raise it when what a step leaves changes its meaning
SAMPLES, SAMPLE = 64, 2**16  # of a large file: this many stretches of so many bytes, evenly spread


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


@dataclass
class Read:
    """The examples of a study's sources and the digests of its models, each found once, or once
    told why not.

    `datasets` are those of the study's settings; `found` has results and errors by what they are
    of.
    """

    datasets: dict[str, StudyDataset]
    found: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """What `find` returned or raised when it was first called for this key."""
        if key not in self.found:
            try:
                self.found[key] = find()
            except InputError as error:
                self.found[key] = error
        if isinstance(self.found[key], InputError):
            raise self.found[key]
        return self.found[key]

    def examples(self, source: Source) -> list[Example]:
        """Raises InputError as `sources.load`."""
        return self.once(f"examples {source.model_dump_json()}", lambda: sources.load(source))

    def digest(self, source: Source) -> str:
        """Of the examples of a source."""
        find = lambda: digest([list(asdict(example).values()) for example in self.examples(source)])  # noqa: E731
        return self.once(f"digest {source.model_dump_json()}", find)

    def model(self, path: str) -> str:
        """`model_digest`."""
        return self.once(f"model {path}", lambda: model_digest(path))

    def cache(self, place: str, examples: Callable[[], list[Example]]) -> Cache:
        """`read_cache`; that of the hub, which no examples are needed for, is read once."""
        return (
            self.once(f"cache {place}", lambda: read_cache(place))
            if place.startswith(PREFIX)
            else read_cache(place, examples)
        )

    def cache_digest(self, place: str) -> str:
        """Of a cache's file, or of the answers that the hub has now."""
        if not place.startswith(PREFIX):
            return file_digest(Path(place))

        def find() -> str:
            return digest(
                [list(asdict(answer).values()) for answer in self.cache(place, list).answers]
            )

        return self.once(f"digest {place}", find)

    def test(self, dataset: str) -> list[Example]:
        """What is asked of a dataset. Raises InputError also where its examples have another
        dataset's name.
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
        given = self.datasets[dataset].schema_source
        return (
            Schema.of(self.examples(given)).labels
            if isinstance(given, Source)
            else tuple(sorted(given))
        )


def run_digest(run: Run, read: Read, before: str | None) -> str:
    """Of a training run.

    Args:
      before: the digest of the run that it starts from; its base is that of `model.path` if there
        is none.

    Raises:
      InputError: examples, text or a base that cannot be read.
    """
    config = run.config
    settings = without(
        config.model_dump(mode="json", exclude_defaults=True),
        {"name", "model.path", "data.text", *FREE_ON_RESUME},
    )
    return digest(
        settings,
        before or read.model(config.model.path),
        [read.digest(one) for one in sources_of(config)],
        text_digest(config),
    )


def sources_of(config: Config) -> list[Source]:
    """The sources of a run's examples and labels."""
    given = [
        config.data.train,
        config.data.validation,
        *(config.data.labels if isinstance(config.data.labels, dict) else {}).values(),
    ]
    parts = [
        part for one in given for part in (one.sources if isinstance(one, Mixture) else (one,))
    ]
    texts = config.data.text.sources if config.data.text else ()
    return [one for one in (*parts, *texts) if isinstance(one, Source)]


def text_digest(config: Config) -> str | None:
    """Of the raw text of a language-model run."""
    from jaxre.data.tokens import read_texts

    text = config.data.text
    return None if text is None else digest(text.model_dump(mode="json"), read_texts(text))


def without(tree: dict[str, Any], dropped: Iterable[str], place: str = "") -> dict[str, Any]:
    """Settings without those of dotted names."""
    kept = {name: value for name, value in tree.items() if place + name not in dropped}
    return {
        name: without(value, dropped, f"{place}{name}.") if isinstance(value, dict) else value
        for name, value in kept.items()
    }


def file_digest(path: Path) -> str:
    """Of the bytes of a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); correct its path in the study's config"
        ) from None


def model_digest(path: str) -> str:
    """Of the files of a model folder: small ones whole, of weights the size and stretches all over.
    Raises InputError.
    """
    folder = resolve_model(path)
    found = hashlib.sha256()
    for file in sorted(
        one for one in folder.rglob("*") if one.is_file() and not one.name.startswith(".")
    ):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= SAMPLES * SAMPLE:
                found.update(opened.read())
                continue
            for number in range(SAMPLES):
                opened.seek(number * (size - SAMPLE) // (SAMPLES - 1))
                found.update(opened.read(SAMPLE))
    return found.hexdigest()


@functools.cache
def code_digest() -> str:
    """Of our own source files."""
    found = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(jaxre_kernels.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            found.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return found.hexdigest()
