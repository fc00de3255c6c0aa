"""Every setting of a run, typed, checked and described."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

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
    ValidationInfo,
    field_validator,
    model_validator,
)

from jaxre.config.places import shipped
from jaxre.config.yaml_text import parse_yaml
from jaxre.errors import InputError

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _label(value: Any) -> Any:
    """A whole number becomes the label that was written (`yaml_text` reads only canonical ones as
    numbers); a fraction is refused, as 1.50 would become 1.5.
    """
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if not labels or not all(label.strip() for label in labels):
        raise ValueError("the schema needs labels, none of them empty")
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the label {repeated[0]!r} is listed twice")
    return labels


# Strict: true is no number, "16" and 16.0 are no whole number, 1 is not true.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Label = Annotated[str, BeforeValidator(_label)]
Proportion = Annotated[Float, Field(ge=0.0, le=1.0)]


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
        """Config key of `columns`, such as data.train.columns, for messages."""
        return self._columns_key

    def with_columns_key(self, key: str) -> Source:
        """The same source with another `columns_key`."""
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
            "none: all examples, shuffled; domains: as many general as literary ones, drawn from"
            " the larger domain"
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
            "its name in predictions (tuned_dataset_name); the datasets' names if not given"
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


def _is_mixture(value: Any) -> bool:
    return isinstance(value, Mixture) or (isinstance(value, dict) and "sources" in value)


# Settings that have one of two forms. Tags are not keys: `first_problem` removes them from the
# place of an error.
Examples = Annotated[
    Annotated[Source, Tag("<source>")] | Annotated[Mixture, Tag("<mixture>")],
    Discriminator(lambda value: "<mixture>" if _is_mixture(value) else "<source>"),
]
Labels = Annotated[tuple[Label, ...], AfterValidator(_distinct)]
DatasetLabels = Annotated[
    Annotated[Source, Tag("<source>")] | Annotated[Labels, Tag("<labels>")],
    Discriminator(lambda value: "<source>" if isinstance(value, Source | dict) else "<labels>"),
]
Schemas = Annotated[
    Annotated[Labels, Tag("<labels>")] | Annotated[dict[str, DatasetLabels], Tag("<datasets>")],
    Discriminator(lambda value: "<datasets>" if isinstance(value, dict) else "<labels>"),
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
        0.0, ge=0.0, lt=1.0, description="share of the pieces held out for validation"
    )
    repeat_sources: Int = Field(
        1, ge=1, description="copies of the sentences that are mixed with the files"
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
            name: schema.with_columns_key(key.format(name))
            if isinstance(schema, Source)
            else schema
            for name, schema in labels.items()
        }

    @model_validator(mode="after")
    def _schema_of_each(self) -> Data:
        if isinstance(self.labels, tuple) and self.has_mixture:
            raise ValueError(
                "data.labels is one list, but each dataset of a mixture has its own schema; write"
                " dataset: [labels] for each"
            )
        return self

    @property
    def has_mixture(self) -> bool:
        """True if training or validation data are a mixture."""
        return isinstance(self.train, Mixture) or isinstance(self.validation, Mixture)


class Prompt(Settings):
    """Template of an example's chat turns. Fields of the user turn: text, marked, head, tail,
    head_type, tail_type.
    """

    system: str | None = (
        "You are an expert relation extraction system. Answer with only the relation label."
    )
    user: str = "Text: {marked}\nHead: {head}\nTail: {tail}\nAnswer:"
    task_definition: Flag = Field(
        False,
        description=(
            "define relation extraction and the direction of a relation in the system turn"
        ),
    )
    enumerate: Flag = Field(False, description="list all labels in the system turn")
    label_definitions: dict[str, str] | Literal["shipped"] | None = Field(
        None,
        description=(
            "definitions of the listed labels: label -> definition, a YAML file or shipped name of"
            " such, or `shipped`: those that ship for each dataset; read with the config and saved"
            " with the run"
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
        "2026-01-01", description="YYYY-MM-DD, today's date in templates that contain it"
    )

    @field_validator("label_definitions", mode="before")
    @classmethod
    def _defined(cls, value: Any) -> Any:
        if value is None or value == "shipped":
            return value
        return read_definitions(value) if isinstance(value, str) else check_definitions(value)

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
            "of base weights and products; auto: bfloat16 on an accelerator, the faster of the two"
            " on a CPU (float32 for train.method=full, so for encoders, and with quantise)"
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
            "activations that the backward pass recomputes to save memory; auto: the first choice"
            " that fits a device"
        ),
    )
    memory_gb: Float | None = Field(
        None,
        gt=0.0,
        description=(
            "memory an update may take on a device, GiB; 95% of the device's memory if not given"
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
    """Devices along each axis; `data` takes the remaining devices if not given."""

    data: Int | None = Field(None, ge=1)
    fsdp: Int = Field(1, ge=1)
    tensor: Int = Field(1, ge=1)
    cpu_devices: Int | None = Field(
        None,
        ge=1,
        description="devices that the CPU is split into, without an accelerator",
    )


class Kernels(Settings):
    """The implementation of each op of a decoder's training. Without a setting, the table of
    measurements decides; without a measurement, XLA is used.
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
            "the prompt at prediction, where it differs from training; settings that are not given"
            " are those of training"
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
        """Completes `predict.prompt` from `prompt`, so that a saved config holds all of it."""
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
        if self.train.objective == "classify":
            self._check_encoder()
        if self.train.method == "full" and self.kernels.lora:
            raise ValueError("kernels.lora is for train.method=lora; leave it out")
        if self.model.quantise and self.train.method == "full":
            raise ValueError(
                "model.quantise=nf4 freezes the base; set train.method=lora, or leave"
                " model.quantise out"
            )
        return self

    def _check_encoder(self) -> None:
        if self.model.quantise:
            raise ValueError(
                "model.quantise=nf4 is for the projections of decoders, train.objective=classify"
                " takes an encoder; leave it out"
            )
        if self.data.has_mixture:
            raise ValueError(
                "train.objective=classify trains one head for one schema; give data.train and"
                " data.validation one source each"
            )
        if self.train.method != "full":
            raise ValueError(
                "train.objective=classify trains all weights of an encoder; set train.method=full"
            )
        if self.train.prompt_weight or self.prompt != Prompt() or self.predict.prompt:
            raise ValueError(
                "train.objective=classify has no prompt, an encoder reads the marked text; leave"
                " prompt and prompt_weight out"
            )
        if self.kernels.lora or self.kernels.cross_entropy:
            raise ValueError(
                "kernels.lora and kernels.cross_entropy are for decoders, train.objective=classify"
                " takes an encoder; leave them out"
            )


def read_definitions(name: str) -> dict[str, str]:
    """Label -> definition, from a YAML file or the shipped definitions of a name such as `conll04`.
    Raises ValueError.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        names = sorted(path.stem for path in shipped("definitions").glob("*.yaml"))
        if name not in names:
            raise ValueError(
                f"no definitions ship under this name; write one of {', '.join(names)}, shipped, or"
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


def check_definitions(tree: Any) -> dict[str, str]:
    """Returns label -> definition. Raises ValueError unless each definition is a line of text."""
    if not isinstance(tree, dict) or not tree:
        raise ValueError("should map each label to its definition")
    definitions = {_label(label): words for label, words in tree.items()}
    for label, words in definitions.items():
        if not isinstance(label, str):
            raise ValueError(f"the label {label!r} should be text; put it in quotes")
        if not isinstance(words, str) or not words.strip() or len(words.splitlines()) != 1:
            raise ValueError(f"the definition of {label!r} should be one line of text")
    return definitions
