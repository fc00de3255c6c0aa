"""Every setting of a run, typed and checked. One YAML file is one run.

    config = load_config("configs/quickstart.yaml", ["lora.rank=32"])

The file is plain YAML: `no` stays the string "no" (a label), dates stay strings, and
resolvers such as `${oc.env:HOME}` are refused, so that nothing of the environment lands in
a saved config. `${name}` refers to another key of the same file.
"""

from __future__ import annotations

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from jaxre.errors import InputError

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _label(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Label = Annotated[str, BeforeValidator(_label)]
Proportion = Annotated[float, Field(ge=0.0, le=1.0)]


class Source(Settings):
    """One split of one dataset."""

    dataset: str = Field(description="a benchmark (facts, semeval2010_task8, conll04), a file (.jsonl, .csv, .parquet), or hub:OWNER/NAME")
    split: str | None = Field(None, description="split of the benchmark or hub dataset; a file has none")
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    columns: dict[str, str] = Field(default_factory=dict, description="our field -> column of the file or hub dataset")
    part: tuple[Proportion, Proportion] = Field((0.0, 1.0), description="the share of the split used, by a fixed hash of the example id")
    limit: int | None = Field(None, ge=1, description="at most this many examples, after a shuffle with seed 42")
    negatives: float = Field(
        1.0, ge=0.0, description="unrelated entity pairs drawn per related pair, where a benchmark states none (conll04)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Source:
        if self.part[0] >= self.part[1]:
            raise ValueError("part must be [start, end] with start < end")
        return self


class Text(Settings):
    """Raw text for the language-model objective: text files, or the texts of a dataset."""

    paths: tuple[str, ...] = Field((), description="text files or folders of .txt files, also below the data folder (JAXRE_DATA)")
    sources: tuple[Source, ...] = Field((), description="datasets of which only the sentences are read")
    holdout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the pieces kept for validation")
    repeat_sources: int = Field(1, ge=1, description="how often the sentences are repeated beside the files")


class Data(Settings):
    train: Source | None = None
    validation: Source | None = None
    test: Source | None = None
    text: Text | None = Field(None, description="train.objective=lm: what to read")
    labels: tuple[Label, ...] | None = Field(None, description="the schema; the labels of the training split if not given")
    too_long: Literal["drop", "error"] = Field("drop", description="an example longer than a row: drop (counted, listed) or stop")
    cache: str = Field("~/.cache/jaxre/tokens", description="folder (or gs:// bucket) of the token cache")


class Prompt(Settings):
    """How an example becomes chat turns. Fields of the user turn: text, marked, head, tail, head_type, tail_type."""

    system: str | None = "You are an expert relation extraction system. Answer with only the relation label."
    user: str = "Text: {marked}\nHead: {head}\nTail: {tail}\nAnswer:"
    enumerate: bool = Field(False, description="list all labels in the system turn")
    shots: int = Field(0, ge=0, description="demonstrations before the example")
    demonstrations: Literal["fixed", "per_example"] = Field("fixed", description="the same for all, or drawn for each example")
    date: str = Field("2026-01-01", pattern=r"^\d{4}-\d{2}-\d{2}$", description="what a template that asks for today's date gets")


class Model(Settings):
    path: str = Field(description="a folder in Hugging Face layout, a run folder, a hub id, or the shipped `facts-base`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of base weights and products; auto: bfloat16 on an accelerator, float32 on CPU"
    )
    architecture: dict[str, Any] | None = Field(
        None, description="train from scratch: the fields of a config.json, with tokenizer from `path`"
    )


class Lora(Settings):
    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0.0)
    dropout: float = Field(0.05, ge=0.0, lt=1.0)
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = LORA_TARGETS
    rslora: bool = Field(False, description="scale alpha/sqrt(rank) in place of alpha/rank")

    @model_validator(mode="after")
    def _targets(self) -> Lora:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must name at least one projection, each once")
        return self


class Train(Settings):
    method: Literal["lora", "full"] = "lora"
    objective: Literal["sft", "lm"] = "sft"
    epochs: int = Field(2, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop the schedule here, whatever the epochs")
    batch_examples: int | None = Field(None, ge=1, description="examples per update")
    batch_tokens: int | None = Field(None, ge=1, description="tokens per update (rows x row_length x accumulation)")
    row_length: int = Field(512, ge=8, description="tokens of a row; a multiple of 128 on an accelerator")
    accumulation: int = Field(1, ge=1, description="micro-batches per update")
    learning_rate: float = Field(1e-4, gt=0.0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.03, ge=0.0, lt=1.0, description="share of the steps")
    weight_decay: float = Field(0.01, ge=0.0)
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    epsilon: float = Field(1e-8, gt=0.0)
    prompt_weight: float = Field(0.0, ge=0.0, le=1.0, description="weight of the prompt's tokens in the training loss; the answer's is 1")
    clip_norm: float = Field(1.0, gt=0.0)
    log_every: int = Field(10, ge=1)
    evaluate_every: int | None = Field(None, ge=1, description="steps between validations; once per epoch if not given")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints; with each validation if not given")
    keep: int = Field(2, ge=1, description="checkpoints kept beside the best")
    best: Literal["f1", "loss"] = Field("f1", description="the validation figure that chooses the best checkpoint")

    @model_validator(mode="after")
    def _batch(self) -> Train:
        if (self.batch_examples is None) == (self.batch_tokens is None):
            raise ValueError("give exactly one of batch_examples and batch_tokens")
        if self.batch_tokens is not None and self.batch_tokens % (self.row_length * self.accumulation):
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of row_length x accumulation ({self.row_length} x {self.accumulation})"
            )
        if self.batch_examples is not None and self.batch_examples % self.accumulation:
            raise ValueError(f"batch_examples={self.batch_examples} is not a multiple of accumulation={self.accumulation}")
        return self


class Mesh(Settings):
    """Devices along each axis; `data` takes what the others leave if not given."""

    data: int | None = Field(None, ge=1)
    fsdp: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)


class Predict(Settings):
    batch_tokens: int = Field(8192, ge=128, description="tokens of a scoring batch")
    max_new_tokens: int = Field(128, ge=1, description="of greedy decoding")


class Config(Settings):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run folder is output/name")
    output: str = "runs"
    seed: int = Field(42, ge=0, lt=2**31)
    model: Model
    data: Data
    prompt: Prompt = Prompt()
    lora: Lora = Lora()
    train: Train
    mesh: Mesh = Mesh()
    predict: Predict = Predict()

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @model_validator(mode="after")
    def _objective(self) -> Config:
        if self.train.objective == "lm" and self.data.text is None:
            raise ValueError("train.objective=lm needs data.text")
        if self.train.objective == "sft" and self.data.train is None:
            raise ValueError("train.objective=sft needs data.train")
        return self


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
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values")
    for override in overrides or []:
        _apply_override(tree, override)
    return check_config(_interpolate(tree, str(path)), str(path))


def check_config(tree: dict, place: str) -> Config:
    """A plain dict as a Config; InputError names the first offending key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{place}: {_first_problem(error)}") from None


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as YAML that `load_config` reads back to an equal Config."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")


class _StringLoader(yaml.SafeLoader):
    """Safe YAML in which only true/false are booleans, dates stay text and a key may occur once."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_StringLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
# YAML 1.1 reads 1e-4 as a string; this is the YAML 1.2 rule.
_StringLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$"), list("-+0123456789.")
)


def parse_yaml(text: str, place: str) -> Any:
    """Plain YAML to Python values, with the rules of this module. Raises InputError."""
    loader = _StringLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{place}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()


def _apply_override(tree: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"{override!r} is not an override; write key=value, such as lora.rank=32")
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = parse_yaml(value, f"override {key}") if value else None


def _interpolate(tree: dict, place: str) -> dict:
    """Resolves `${key}` within the file; a resolver (`${name:...}`) is refused."""
    found = re.search(r"\$\{\s*[^}]*:[^}]*\}?", str(tree))
    if found:
        raise InputError(
            f"{place}: {found.group(0)} is a resolver, which is refused so that no environment value lands in a run; write the value itself"
        )
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{place}: {str(error).splitlines()[0]}") from None


def _valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Settings):
                keys += _valid_keys(part, prefix + name + ".")
    return keys


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, _valid_keys(), n=1, cutoff=0.0)
        return f"{key}: unknown key; the nearest valid key is {nearest[0]}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing; add it"
    given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
    return f"{key + ': ' if key else ''}{message}{given}"
