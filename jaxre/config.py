"""Every setting of a run, typed and checked. One YAML file is one run.

    config = load_config("configs/quickstart.yaml", ["lora.rank=32"])

The file is plain YAML: `no` stays the string "no" (a label), dates stay strings, and
resolvers such as `${oc.env:HOME}` are refused, so that nothing of the environment lands in
a saved config. `${name}` refers to another key of the same file; `\\${` is a literal `${`.
"""

from __future__ import annotations

import datetime
import difflib
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Strict,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from jaxre.errors import InputError

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _label(value: Any) -> Any:
    """A whole number is the label it was written as (the YAML rules below see to that); a fraction
    may not be: 1.50.
    """
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if not labels or not all(label.strip() for label in labels):
        raise ValueError("the schema needs labels, none of them empty")
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"the label {twice[0]!r} is listed twice")
    return labels


# Strict: true is no number, "16" and 16.0 are no whole number, 1 is not true.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Label = Annotated[str, BeforeValidator(_label)]
Proportion = Annotated[Float, Field(ge=0.0, le=1.0)]
Checked = TypeVar("Checked", bound=Settings)


class Source(Settings):
    """One split of one dataset."""

    dataset: str = Field(
        min_length=1,
        description=(
            "a benchmark (facts, semeval2010_task8, ...), a file (.jsonl, .csv, .parquet), or"
            " hub:OWNER/NAME"
        ),
    )
    split: str | None = Field(
        None, description="split of the benchmark or hub dataset; a file has none"
    )
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our field -> column of the file or hub dataset"
    )
    part: tuple[Proportion, Proportion] = Field(
        (0.0, 1.0), description="the share of the split used, by a fixed hash of the example id"
    )
    limit: Int | None = Field(
        None, ge=1, description="at most this many examples, after a shuffle with seed 42"
    )
    negatives: Float = Field(
        1.0,
        ge=0.0,
        description=(
            "unrelated entity pairs drawn per related pair, where a benchmark states none (conll04,"
            " re_docred)"
        ),
    )
    window: Int = Field(
        1,
        ge=0,
        description="sentences around a pair where a benchmark has whole documents (re_docred)",
    )
    label_map: str | None = Field(
        None,
        min_length=1,
        description="file that maps labels to others; unlisted ones are left out and counted",
    )
    _columns_key: str = PrivateAttr("columns")

    @property
    def columns_key(self) -> str:
        """What a user writes for `columns`, such as data.train.columns: for messages."""
        return self._columns_key

    def with_columns_key(self, key: str) -> Source:
        """The same source, whose messages name its columns so."""
        copy = self.model_copy()
        copy._columns_key = key
        return copy

    @model_validator(mode="after")
    def _ordered(self) -> Source:
        if self.part[0] >= self.part[1]:
            raise ValueError("part must be [start, end] with start < end")
        return self


class Mixture(Settings):
    """Several sources as one training or validation set (`relations/mixtures.py`); the `limit` of
    each source is its cap.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    balance: Literal["none", "domains"] = Field(
        "none",
        description=(
            "none: all examples, shuffled; domains: as many general as literary ones, those of the"
            " larger domain drawn"
        ),
    )
    limit: Int | None = Field(
        None,
        ge=1,
        description="at most this many examples of the mixture, after a shuffle with seed 42",
    )
    name: str | None = Field(
        None,
        min_length=1,
        description=(
            "what predictions call it (tuned_dataset_name); the datasets' names if not given"
        ),
    )

    def with_columns_key(self, key: str) -> Mixture:
        """The same mixture, whose messages name the columns of source number i as
        `key.sources.i.columns`.
        """
        section = key.removesuffix(".columns")
        named = tuple(
            source.with_columns_key(f"{section}.sources.{number}.columns")
            for number, source in enumerate(self.sources)
        )
        return self.model_copy(update={"sources": named})


def _is_mixture(given: Any) -> bool:
    return isinstance(given, Mixture) or (isinstance(given, dict) and "sources" in given)


# Which of its forms a setting has. The tags are no keys: `_first_problem` takes them out of the
# place of an error.
Examples = Annotated[
    Annotated[Source, Tag("<source>")] | Annotated[Mixture, Tag("<mixture>")],
    Discriminator(lambda given: "<mixture>" if _is_mixture(given) else "<source>"),
]
Labels = Annotated[tuple[Label, ...], AfterValidator(_distinct)]
DatasetLabels = Annotated[
    Annotated[Source, Tag("<source>")] | Annotated[Labels, Tag("<labels>")],
    Discriminator(lambda given: "<source>" if isinstance(given, Source | dict) else "<labels>"),
]
Schemas = Annotated[
    Annotated[Labels, Tag("<labels>")] | Annotated[dict[str, DatasetLabels], Tag("<datasets>")],
    Discriminator(lambda given: "<datasets>" if isinstance(given, dict) else "<labels>"),
]


class Text(Settings):
    """Raw text for the language-model objective: text files, or the texts of a dataset."""

    paths: tuple[str, ...] = Field(
        (),
        description="text files or folders of .txt files, also below the data folder (JAXRE_DATA)",
    )
    sources: tuple[Source, ...] = Field(
        (), description="datasets of which only the sentences are read"
    )
    holdout: Float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the pieces kept for validation"
    )
    repeat_sources: Int = Field(
        1, ge=1, description="how often the sentences are repeated beside the files"
    )


class Data(Settings):
    train: Examples | None = None
    validation: Examples | None = None
    test: Source | None = None
    text: Text | None = Field(None, description="train.objective=lm: what to read")
    labels: Schemas | None = Field(
        None,
        description=(
            "the schema: labels, or for each dataset its labels or the source they are collected"
            " from; those of a dataset's training examples if not given"
        ),
    )
    dedup: Flag = Field(
        False,
        description="leave out training examples whose text occurs in the validation or test data",
    )
    too_long: Literal["drop", "error"] = Field(
        "drop", description="an example longer than a row: drop (counted, listed) or stop"
    )
    cache: str = Field(
        "~/.cache/jaxre/tokens",
        min_length=1,
        description="folder (or gs:// bucket) of the token cache",
    )

    @field_validator("train", "validation", "test")
    @classmethod
    def _keyed(
        cls, source: Source | Mixture | None, info: ValidationInfo
    ) -> Source | Mixture | None:
        return source and source.with_columns_key(f"data.{info.field_name}.columns")

    @field_validator("labels")
    @classmethod
    def _named(
        cls, labels: tuple[str, ...] | dict[str, Any] | None
    ) -> tuple[str, ...] | dict[str, Any] | None:
        if labels == {}:
            raise ValueError("names no dataset; write dataset: [labels], or leave it out")
        if not isinstance(labels, dict):
            return labels
        key = "data.labels.{}.columns"
        return {
            name: one.with_columns_key(key.format(name)) if isinstance(one, Source) else one
            for name, one in labels.items()
        }

    @model_validator(mode="after")
    def _schema_of_each(self) -> Data:
        if isinstance(self.labels, tuple) and any(
            isinstance(one, Mixture) for one in (self.train, self.validation)
        ):
            raise ValueError(
                "data.labels is one list, but each dataset of a mixture has its own schema; write"
                " dataset: [labels] for each"
            )
        return self


class Prompt(Settings):
    """How an example becomes chat turns. Fields of the user turn: text, marked, head, tail,
    head_type, tail_type.
    """

    system: str | None = (
        "You are an expert relation extraction system. Answer with only the relation label."
    )
    user: str = "Text: {marked}\nHead: {head}\nTail: {tail}\nAnswer:"
    task_definition: Flag = Field(
        False,
        description=(
            "say in the system turn what relation extraction is, and which way a relation is read"
        ),
    )
    enumerate: Flag = Field(False, description="list all labels in the system turn")
    label_definitions: dict[str, str] | Literal["shipped"] | None = Field(
        None,
        description=(
            "what each listed label means: label -> definition, a YAML file or shipped name of"
            " such, or shipped: those of each dataset's own name; read when the config is, so that"
            " a run keeps them"
        ),
    )
    shots: Int = Field(0, ge=0, description="demonstrations before the example")
    demonstrations: Literal["fixed", "per_example", "stratified"] = Field(
        "fixed",
        description=(
            "fixed: the same for all, of labels drawn at random; stratified: the same for all, of"
            " the most frequent labels; per_example: drawn for each example"
        ),
    )
    date: str = Field(
        "2026-01-01", description="YYYY-MM-DD: what a template that asks for today's date gets"
    )

    @field_validator("label_definitions", mode="before")
    @classmethod
    def _defined(cls, given: Any) -> Any:
        if given is None or given == "shipped":
            return given
        return read_definitions(given) if isinstance(given, str) else check_definitions(given)

    @model_validator(mode="after")
    def _listed(self) -> Prompt:
        if self.label_definitions is not None and not self.enumerate:
            raise ValueError(
                "label_definitions stand beside the listed labels; set enumerate=true too, or leave"
                " them out"
            )
        return self

    @field_validator("date")
    @classmethod
    def _day(cls, date: str) -> str:
        try:
            if datetime.date.fromisoformat(date).isoformat() == date:
                return date
        except ValueError:
            pass
        raise ValueError("write a day as YYYY-MM-DD")


class Model(Settings):
    path: str = Field(
        description=(
            "a folder in Hugging Face layout, a run folder, a hub id, or the shipped `facts-base`"
        )
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description=(
            "of base weights and products; auto: bfloat16 on an accelerator, what multiplies"
            " faster on a CPU (float32 for train.method=full, so for encoders, and with quantise)"
        ),
    )
    quantise: Literal["nf4"] | None = Field(
        None,
        description=(
            "nf4: the projections of the base as NF4 (QLoRA), quantised when it is loaded; as"
            " stored if not given"
        ),
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description="train from scratch: the fields of a config.json, with tokenizer from `path`",
    )


class Lora(Settings):
    rank: Int = Field(16, ge=1, le=1024)
    alpha: Float = Field(32.0, gt=0.0)
    dropout: Float = Field(0.05, ge=0.0, lt=1.0)
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = LORA_TARGETS
    rslora: Flag = Field(False, description="scale alpha/sqrt(rank) in place of alpha/rank")

    @model_validator(mode="after")
    def _targets(self) -> Lora:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must name at least one projection, each once")
        return self


class Train(Settings):
    method: Literal["lora", "full"] = "lora"
    objective: Literal["sft", "lm", "classify"] = Field(
        "sft", description="sft: answers; lm: raw text; classify: an encoder's labels"
    )
    epochs: Int = Field(2, ge=1)
    max_steps: Int | None = Field(
        None, ge=1, description="stop the schedule here, whatever the epochs"
    )
    batch_examples: Int | None = Field(None, ge=1, description="examples per update")
    batch_tokens: Int | None = Field(
        None, ge=1, description="tokens per update (rows x row_length x accumulation)"
    )
    row_length: Int = Field(
        512, ge=8, description="tokens of a row; a multiple of 128 on an accelerator"
    )
    accumulation: Int = Field(1, ge=1, description="micro-batches per update")
    learning_rate: Float = Field(1e-4, gt=0.0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Float = Field(0.03, ge=0.0, lt=1.0, description="share of the steps")
    weight_decay: Float = Field(0.01, ge=0.0)
    beta1: Float = Field(0.9, ge=0.0, lt=1.0)
    beta2: Float = Field(0.999, ge=0.0, lt=1.0)
    epsilon: Float = Field(1e-8, gt=0.0)
    prompt_weight: Float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="weight of the prompt's tokens in the training loss; the answer's is 1",
    )
    clip_norm: Float = Field(1.0, gt=0.0)
    remat: Literal["auto", "none", "block"] = Field(
        "auto",
        description=(
            "what the backward pass computes again to save memory; auto: the first that fits a"
            " device"
        ),
    )
    memory_gb: Float | None = Field(
        None,
        gt=0.0,
        description=(
            "memory an update may take on a device, GiB; 95% of what the device reports if not"
            " given"
        ),
    )
    log_every: Int = Field(10, ge=1)
    evaluate_every: Int | None = Field(
        None, ge=1, description="steps between validations; once per epoch if not given"
    )
    checkpoint_every: Int | None = Field(
        None, ge=1, description="steps between checkpoints; with each validation if not given"
    )
    keep: Int = Field(2, ge=1, description="checkpoints kept beside the best")
    best: Literal["f1", "loss"] = Field(
        "f1", description="the validation figure that chooses the best checkpoint"
    )

    @model_validator(mode="after")
    def _batch(self) -> Train:
        if (self.batch_examples is None) == (self.batch_tokens is None):
            raise ValueError("give exactly one of batch_examples and batch_tokens")
        if self.batch_tokens is not None and self.batch_tokens % (
            self.row_length * self.accumulation
        ):
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of row_length x accumulation"
                f" ({self.row_length} x {self.accumulation})"
            )
        if self.batch_examples is not None and self.batch_examples % self.accumulation:
            raise ValueError(
                f"batch_examples={self.batch_examples} is not a multiple of"
                f" accumulation={self.accumulation}"
            )
        return self


class Mesh(Settings):
    """Devices along each axis; `data` takes what the others leave if not given."""

    data: Int | None = Field(None, ge=1)
    fsdp: Int = Field(1, ge=1)
    tensor: Int = Field(1, ge=1)
    cpu_devices: Int | None = Field(
        None, ge=1, description="devices that a machine without accelerator is split into"
    )


class Kernels(Settings):
    """The implementation of each op of a decoder's training; the table of measurements decides
    where none is given, else XLA.
    """

    attention: Literal["xla", "pallas_gpu", "pallas_gpu_sm80", "pallas_tpu"] | None = None
    lora: Literal["xla", "pallas_gpu", "pallas_tpu"] | None = None
    cross_entropy: Literal["xla", "pallas_gpu", "pallas_tpu"] | None = None


class Predict(Settings):
    batch_tokens: Int = Field(8192, ge=128, description="tokens of a scoring batch")
    max_new_tokens: Int = Field(128, ge=1, description="of greedy decoding")
    prompt: Prompt | None = Field(
        None,
        description=(
            "the prompt at prediction, where it is not that of training: what is not given here is"
            " that of training"
        ),
    )


class Config(Settings):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run folder is output/name"
    )
    output: str = "runs"
    seed: Int = Field(42, ge=0, lt=2**31)
    model: Model
    data: Data
    prompt: Prompt = Prompt()
    lora: Lora = Lora()
    train: Train
    mesh: Mesh = Mesh()
    kernels: Kernels = Kernels()
    predict: Predict = Predict()

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def prediction_prompt(self) -> Prompt:
        return self.predict.prompt or self.prompt

    @model_validator(mode="before")
    @classmethod
    def _prediction_prompt(cls, tree: Any) -> Any:
        """`predict.prompt` completed by `prompt`, so that a saved config holds the whole of it."""
        parts = [
            tree.get("prompt", {}),
            tree.get("predict"),
            isinstance(tree.get("predict"), dict) and tree["predict"].get("prompt"),
        ]
        if not all(isinstance(part, dict) for part in parts):
            return tree
        training, predict, prediction = parts
        return {**tree, "predict": {**predict, "prompt": {**training, **prediction}}}

    @model_validator(mode="after")
    def _objective(self) -> Config:
        if self.train.objective == "lm" and self.data.text is None:
            raise ValueError("train.objective=lm needs data.text")
        if self.train.objective != "lm" and self.data.train is None:
            raise ValueError(f"train.objective={self.train.objective} needs data.train")
        if self.train.objective == "classify" and self.model.quantise:
            raise ValueError(
                "model.quantise=nf4 is for the projections of decoders, train.objective=classify"
                " takes an encoder; leave it out"
            )
        if self.train.objective == "classify" and any(
            isinstance(one, Mixture) for one in (self.data.train, self.data.validation)
        ):
            raise ValueError(
                "train.objective=classify trains one head for one schema; give data.train and"
                " data.validation one source each"
            )
        if self.train.objective == "classify" and self.train.method != "full":
            raise ValueError(
                "train.objective=classify trains all weights of an encoder; set train.method=full"
            )
        if self.train.objective == "classify" and (
            self.train.prompt_weight or self.prompt != Prompt() or self.predict.prompt
        ):
            raise ValueError(
                "train.objective=classify has no prompt, an encoder reads the marked text; leave"
                " prompt and prompt_weight out"
            )
        if self.train.objective == "classify" and self.kernels != Kernels(
            attention=self.kernels.attention
        ):
            raise ValueError(
                "kernels.lora and kernels.cross_entropy are for decoders, train.objective=classify"
                " takes an encoder; leave them out"
            )
        if self.train.method == "full" and self.kernels.lora:
            raise ValueError("kernels.lora is for train.method=lora; leave it out")
        if self.model.quantise and self.train.method == "full":
            raise ValueError(
                "model.quantise=nf4 freezes the base; set train.method=lora, or leave"
                " model.quantise out"
            )
        return self


def read_definitions(name: str) -> dict[str, str]:
    """Label -> definition, of a YAML file, or of what ships under a name such as `conll04`. Raises
    ValueError.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        there = sorted(one.stem for one in shipped("definitions").glob("*.yaml"))
        if name not in there:
            raise ValueError(
                f"no definitions ship under this name; write one of {', '.join(there)}, shipped, or"
                " a .yaml file"
            )
        path = shipped("definitions") / f"{name}.yaml"
    try:
        return check_definitions(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); give a YAML file of lines such as `born_in: the head"
            " was born in the tail`"
        ) from None
    except InputError as error:
        raise ValueError(str(error)) from None


def check_definitions(given: Any) -> dict[str, str]:
    """The mapping, if each label has a definition in words. Raises ValueError."""
    if not isinstance(given, dict) or not given:
        raise ValueError("should map each label to its definition")
    given = {_label(label): words for label, words in given.items()}
    for label, words in given.items():
        if not isinstance(label, str):
            raise ValueError(f"the label {label!r} should be text; put it in quotes")
        if not isinstance(words, str) or not words.strip() or len(words.splitlines()) != 1:
            raise ValueError(f"the definition of {label!r} should be one line of text")
    return given


def shipped(name: str) -> Path:
    """Folder of what the project ships, such as "corpus" or "facts-base"."""
    return Path(str(resources.files("jaxre"))) / "assets" / name


def data_root() -> Path:
    """Folder of the real benchmarks: JAXRE_DATA, else ../shared/data."""
    return Path(os.environ.get("JAXRE_DATA", "../shared/data"))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads and checks a run's YAML file, with `key=value` overrides on top.

    Raises:
      InputError: missing file, broken YAML, a resolver, an unknown key (with the nearest
        valid one), a wrong type or bound.
    """
    return check_config(load_tree(path, overrides), str(path))


def load_tree(path: str | Path, overrides: list[str] | None = None) -> dict:
    """A YAML file with overrides on top, as plain values that nothing has been checked of. Raises
    InputError as `load_config`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such config file; give the path of a YAML file, such as"
            " configs/quickstart.yaml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8"
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: a config is a mapping of keys to values; write lines such as `name: mine`"
        )
    for override in overrides or []:
        _apply_override(tree, override)
    return _interpolate(tree, str(path))


def check_config(tree: dict, place: str) -> Config:
    """A plain dict as a Config; InputError names the first offending key."""
    return check_settings(Config, tree, place)


def check_settings(kind: type[Checked], tree: dict, place: str) -> Checked:
    """A plain dict as settings of a kind; InputError names the first offending key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{place}: {_first_problem(error, kind)}") from None


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config, whole or not at all, as YAML that `load_config` reads back to an
    equal Config.
    """
    # OmegaConf reads `\${` as a literal `${`, and halves the backslashes before it.
    tree = _map_strings(
        config.model_dump(mode="json"), lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    )
    written = path.with_name(path.name + ".part")
    written.write_text(
        yaml.dump(tree, Dumper=_StringDumper, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    written.replace(path)


class _StringLoader(yaml.SafeLoader):
    """Safe YAML in which only true/false are booleans, dates stay text and a key may occur once."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in ("bool", "timestamp", "int", "float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _StringDumper(yaml.SafeDumper):
    """Safe YAML in which line breaks other than a line feed are escaped; PyYAML alone reads them
    back as another text.
    """

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


# YAML 1.1 reads `no` as false, 1e-4 as text, 007 as 7 and 1:30 as 90. Here a whole number is one
# that prints as it was written, and a fraction has a point or an exponent (YAML 1.2); all else is
# text.
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("int", r"^(?:0|-?[1-9][0-9]*)$", "-0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
):
    _StringLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
    )
    # On top of YAML 1.1's, so that text which either would misread is quoted.
    _StringDumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
    )
_StringDumper.add_representer(str, _StringDumper.represent_str)


def parse_yaml(text: str, place: str) -> Any:
    """Plain YAML to Python values, with the rules of this module. Raises InputError."""
    try:
        loader = _StringLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            f"{place}{line}: not valid YAML: {problem}; correct it, or put the value in quotes"
        ) from None
    except RecursionError:
        raise InputError(
            f"{place}: not a config: nested too deep; take some brackets out"
        ) from None


def _apply_override(tree: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    words = key.strip().split(".")
    if not separator or not all(words):
        raise InputError(f"{override!r} is not an override; write key=value, such as lora.rank=32")
    node, place = tree, []
    while True:
        # Names of models have points: the longest key that is there is meant.
        taken = next(
            (count for count in range(len(words), 1, -1) if ".".join(words[:count]) in node), 1
        )
        name, words = ".".join(words[:taken]), words[taken:]
        if not words:
            break
        place.append(name)
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            whole = ".".join(place)
            raise InputError(
                f"override {key}: {whole} is not a mapping but {node!r}; give the whole of it, as"
                f" {whole}=VALUE"
            )
    node[name] = parse_yaml(value, f"override {key}") if value else None


def _interpolate(tree: dict, place: str) -> dict:
    """Resolves `${key}` within the file; a resolver (`${name:...}`, also one put together from
    parts) is refused.
    """

    def check(text: str) -> str:
        for found in re.finditer(r"(?<!\\)(?:\\\\)*(\$\{[^}]*\}?)", text):
            given = found.group(1)
            if ":" in given or given.count("${") > 1:
                raise InputError(
                    f"{place}: {given} is a resolver, which is refused so that no environment value"
                    " lands in a run; write the value itself"
                )
            if not re.fullmatch(r"\$\{[\w.-]+\}", given):
                raise InputError(
                    f"{place}: {given!r} is no key of this file; write \\${{ for a literal ${{"
                )
        return text

    try:
        return OmegaConf.to_container(OmegaConf.create(_map_strings(tree, check)), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(
            f"{place}: {str(error).splitlines()[0]}; write \\${{ for a literal ${{"
        ) from None
    except RecursionError:
        raise InputError(f"{place}: a value refers to itself; write the value itself") from None


def _map_strings(tree: Any, change: Callable[[str], str]) -> Any:
    """The tree with every string changed, keys too."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, dict):
        return {
            _map_strings(key, change): _map_strings(value, change) for key, value in tree.items()
        }
    return [_map_strings(value, change) for value in tree] if isinstance(tree, list) else tree


def _valid_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Settings):
                keys += _valid_keys(part, prefix + name + ".")
    return keys


def _parts(annotation: Any) -> list[Any]:
    """A type and all types that it is made of."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _parts(part))]


def _nearest_key(key: str, kind: type[BaseModel]) -> str:
    """The valid key most like an unknown one: by name anywhere (`rank` is lora.rank), else by
    spelling.
    """
    valid, (section, _, name) = _valid_keys(kind), key.rpartition(".")
    namesakes = [one for one in valid if one.rpartition(".")[2] == name]
    beside = [one for one in valid if one.rpartition(".")[0] == section]
    for candidates, cutoff in ((namesakes, 0.0), (beside, 0.8), (valid, 0.0)):
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff)
        if nearest:
            return nearest[0]
    return valid[0]


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key is told before the required one that it leaves missing.
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    place = [part for part in problem["loc"] if not str(part).startswith("<")]
    key = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        plain = ".".join(part for part in place if isinstance(part, str))
        if "<mixture>" in problem["loc"] and place[-1] in Source.model_fields:
            return f"{key}: unknown key; a mixture has it in each of its sources"
        return f"{key}: unknown key; the nearest valid key is {_nearest_key(plain, kind)}"
    if problem["type"] == "missing":
        return f"{key}: missing; add it"
    message = {
        "model_type": "should be a mapping of keys to values",
        "dict_type": "should be a mapping of keys to values",
        "tuple_type": "should be a list",
        "too_short": "should not be empty",
        "string_type": "should be text; put it in quotes",
        "int_type": "should be a whole number",
        "float_type": "should be a number",
        "bool_type": "should be true or false",
    }.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    # A check over several keys is given all of them: too long to print.
    given = (
        ""
        if problem["type"] == "value_error" and isinstance(problem["input"], dict)
        else f" (given: {problem['input']!r})"
    )
    return f"{key + ': ' if key else ''}{message}{given}"
