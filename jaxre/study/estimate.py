"""FLOPs of the steps of a study, and the expected seconds on this machine.

FLOPs are those of `profiling/ledger.py`: of training, counted on the packed rows of a sample of the
run's own mixture and scaled up; of prediction, those of the forward pass. Seconds follow from
FLOP/s: those that finished steps of the same kind and base reached in this study, else a share of
the matrix rate measured on this machine before anything runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxre_kernels.nf4 import forms

from jaxre.checkpoints.source import dtype_of, tokenizer_folder
from jaxre.config import Config, Lora, Mixture, Prompt, Source
from jaxre.data.dataset import make_plan
from jaxre.data.markers import add_markers, encode_marked, marked_text, markers_in
from jaxre.data.rows import fill_update
from jaxre.data.template import ChatTemplate
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import demonstrator, questions_of
from jaxre.inference.answers import label_answers
from jaxre.models import sharding
from jaxre.models.architecture import EncoderArchitecture, architecture_of, read_architecture
from jaxre.models.weights import AnyArchitecture, places, table
from jaxre.objectives import load_dataset
from jaxre.profiling.ledger import Work, flops_of, work_of
from jaxre.profiling.measure import matrix_rate
from jaxre.relations import mixtures
from jaxre.relations.draws import draw
from jaxre.study.digests import Read

SAMPLE = 256  # examples of a run whose rows are packed and counted
PROMPTS = 32  # examples of a dataset whose prompts are rendered and tokenised
# Shares of the matrix rate, used until a step of the study is measured: two CPU cores, the shipped
# base and the MiniLM encoder.
SHARES = {"train": 0.4, "predict": 0.25}
PRODUCT = 2e9  # most FLOPs of a product whose rate is measured: a second on a slow core


@dataclass(frozen=True)
class Load:
    """The work of a step: examples and real tokens (of training, in all epochs), FLOPs of training
    and of prediction.
    """

    examples: int = 0
    tokens: float = 0.0
    train_flops: float = 0.0
    predict_flops: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(*map(operator.add, vars(self).values(), vars(other).values()))


@dataclass
class Rates:
    """FLOP/s by kind of work and architecture; `seen` has (FLOPs, seconds) of finished steps."""

    mesh: jax.sharding.Mesh | None
    seen: dict[tuple[str, AnyArchitecture], tuple[float, float]] = field(default_factory=dict)
    measured: dict[AnyArchitecture, float] = field(default_factory=dict)

    def add(self, step: str, architecture: AnyArchitecture, load: Load, seconds: float) -> None:
        """Adds a finished step: training without its validations, or a prediction."""
        flops = {"train": load.train_flops, "predict": load.predict_flops}.get(step)
        if flops:
            key = step, _without_dataset(architecture)
            before = self.seen.get(key, (0.0, 0.0))
            self.seen[key] = before[0] + flops, before[1] + seconds

    def rate(self, kind: str, architecture: AnyArchitecture, dtype: np.dtype) -> float:
        """FLOP/s; measures the products of the architecture at its first call."""
        flops, seconds = self.seen.get((kind, _without_dataset(architecture)), (0.0, 0.0))
        if seconds:
            return flops / seconds
        if architecture not in self.measured:
            largest = max(
                math.prod(weight.shape(architecture))
                for weight in table(architecture)
                if weight.in_layer
            )
            length = int(min(1024, max(16, PRODUCT / (2 * largest))))
            self.measured[architecture] = matrix_rate(
                architecture, sharding.row_shards(self.mesh), length, dtype, self.mesh
            )
        return SHARES[kind] * self.measured[architecture]

    def seconds(self, load: Load, architecture: AnyArchitecture, dtype: np.dtype) -> float:
        """Expected seconds of a step."""
        parts = (("train", load.train_flops), ("predict", load.predict_flops))
        return sum(flops / self.rate(kind, architecture, dtype) for kind, flops in parts if flops)


def _without_dataset(architecture: AnyArchitecture) -> AnyArchitecture:
    """The architecture without labels and marker tokens, the only parts in which the encoders of
    several datasets differ.
    """
    if isinstance(architecture, EncoderArchitecture):
        return dataclasses.replace(architecture, labels=(), vocabulary=0)
    return architecture


def device_description() -> str:
    """Number and kind of the devices, such as "8 x NVIDIA H200"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def architecture_for(config: Config) -> AnyArchitecture:
    """The architecture that `model.path` names, without its weights. Raises InputError."""
    if config.model.architecture is not None:
        return architecture_of(config.model.architecture, "model.architecture")
    return read_architecture(tokenizer_folder(config))


def dtype_for(config: Config) -> np.dtype:
    return dtype_of(config).dtype


def training_load(config: Config, read: Read) -> Load:
    """The work of a run from step 1 to its end, with its validations. Raises InputError: data, a
    tokenizer or a template that cannot be used.
    """
    architecture = architecture_for(config)
    used, sampled = _sampled(config)
    split = load_dataset(sampled, tokenizer_folder(config)).train
    tokens = split.tokens
    epoch = sampled.model_copy(update={"train": sampled.train.model_copy(update={"epochs": 1})})
    plan = make_plan(epoch, tokens, shards=1)
    work = Work(0, 0, 0, 0, 0)
    encoder = isinstance(architecture, EncoderArchitecture)
    for update in plan.updates:
        rows = fill_update(tokens, plan.prefixes, update)
        work += work_of(rows, encoder, None if encoder else architecture.window)
    lora = config.lora if config.train.method == "lora" else None
    flops = sum(flops_of(work, architecture, lora).values())
    fitting = len(tokens) / (len(tokens) + len(split.dropped))
    scale = fitting * used / len(tokens) * config.train.epochs
    updates = len(plan.updates) * scale
    if config.train.max_steps:
        scale *= min(1.0, config.train.max_steps / updates)
        updates = min(updates, config.train.max_steps)
    training = Load(round(fitting * used), float(tokens.lengths.sum()) * scale, flops * scale)
    if config.data.validation is None:
        return training
    every = config.train.evaluate_every or max(1.0, updates / config.train.epochs)
    validations = max(1, round(updates / every))
    return training + Load(predict_flops=_validation_flops(config, read) * validations)


def _sampled(config: Config) -> tuple[int, Config]:
    """The number of examples that a run trains on, and the run on a sample of them, to which each
    source contributes its share.
    """
    if config.train.objective == "lm":
        tokens = load_dataset(config, tokenizer_folder(config)).train.tokens
        return len(tokens), config
    pool = mixtures.read(config.data.train, "data.train")
    used = sum(count.used for count in pool.counts)
    drawn = tuple(
        source.model_copy(update={"limit": min(count.read, math.ceil(SAMPLE * count.used / used))})
        for source, count in zip(pool.sources, pool.counts, strict=True)
        if count.used
    )
    train = Mixture(sources=drawn) if isinstance(config.data.train, Mixture) else drawn[0]
    return used, config.model_copy(
        update={"data": config.data.model_copy(update={"train": train, "validation": None})}
    )


def _validation_flops(config: Config, read: Read) -> float:
    """FLOPs of one validation of a run."""
    pool = mixtures.read(config.data.validation, "data.validation")
    return sum(
        prediction_load(config, read, config.prompt, "score", source, count.used).predict_flops
        for source, count in zip(pool.sources, pool.counts, strict=True)
        if count.used
    )


def prediction_load(
    config: Config, read: Read, prompt: Prompt, mode: str, source: Source, count: int
) -> Load:
    """The load of a prediction of `count` examples of a source; sliding layers count as global
    ones. Raises InputError as `training_load`.
    """
    architecture = architecture_for(config)
    examples = draw(read.examples(source), PROMPTS, 0)
    folder = tokenizer_folder(config)
    if isinstance(architecture, EncoderArchitecture):
        tokenizer = load_tokenizer(folder)
        add_markers(tokenizer, examples)
        texts = [marked_text(example, markers_in(tokenizer)) for example in examples]
        length = float(encode_marked(examples, texts, tokenizer).lengths.mean())
        work = Work(
            round(length * count),
            count,
            count,
            round(length * length * count),
            round(length * count),
        )
        return Load(count, length * count, predict_flops=forward_flops(work, architecture))
    template = ChatTemplate(load_tokenizer(folder), prompt.date, str(folder))
    dataset = examples[0].dataset
    train = read.examples(read.datasets[dataset].train) if prompt.shots else []
    shown = demonstrator(train, prompt, config.seed)
    labels = read.labels(dataset)
    prompts, answers = label_answers(
        template, questions_of(examples, prompt, labels, shown), labels
    )
    length, shared = float(np.mean(list(map(len, prompts)))), _common_prefix(prompts)
    # Scoring reads each token of the tree of labels once; a generated answer is taken to have the
    # mean length of a label.
    tree = {ids[:end] for ids in answers[0] for end in range(1, len(ids) + 1)}
    answer = len(tree) if mode == "score" else float(np.mean(list(map(len, answers[0]))))
    own = length - shared + answer
    positions = round(answer * count)
    work = Work(
        round(own * count + shared),
        positions,
        positions,
        round(own * length * count),
        round(positions * length),
    )
    return Load(count, own * count + shared, predict_flops=forward_flops(work, architecture))


def forward_flops(work: Work, architecture: AnyArchitecture) -> float:
    """FLOPs of the forward pass: a third of those of full fine-tuning."""
    return sum(flops_of(work, architecture, None).values()) / 3


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of the prefix that all prompts share; leaves at least one token of each prompt."""
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    return next(
        (place for place in range(shortest) if first[place] != last[place]), max(0, shortest)
    )


@functools.cache
def sizes_of(
    architecture: AnyArchitecture, itemsize: int, lora: Lora | None = None
) -> dict[str, int]:
    """Bytes of a model: base and merged in the compute dtype, NF4 (projections; the rest as base),
    adapter in f32.

    Args:
      itemsize: bytes of a dense weight.
      lora: the adapter's settings, None without one.
    """
    base = nf4 = adapter = 0
    for weight, _, shape, _ in places(architecture):
        dense = math.prod(shape) * itemsize
        base += dense
        if weight.lora:
            nf4 += sum(
                math.prod(size) * kind.itemsize
                for size, kind in forms(shape[:-3:-1], shape[:-2]).values()
            )
        else:
            nf4 += dense
        if lora is not None and weight.name in lora.targets:
            adapter += 4 * lora.rank * sum(shape[-2:]) * math.prod(shape[:-2])
    sizes = {"base": base, "merged": base}
    if not isinstance(architecture, EncoderArchitecture):
        sizes["nf4"] = nf4
    return sizes | ({"adapter": adapter} if lora is not None else {})
