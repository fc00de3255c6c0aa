"""Initial state of a run, on the mesh: base weights, trainable factors or masters, moments."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxre_kernels.lora import nf4_form, stored
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight

from jaxre.checkpoints.source import Loaded, open_model
from jaxre.config import Config, Kernels
from jaxre.data.dataset import Dataset
from jaxre.errors import InputError
from jaxre.models import sharding
from jaxre.models.activations import activations_for
from jaxre.models.architecture import EncoderArchitecture, architecture_of, check_vocabulary
from jaxre.models.encoder import for_task
from jaxre.models.kernels import table_kind
from jaxre.models.lora import init_adapter
from jaxre.models.quantised import is_nf4, is_quantised
from jaxre.models.weights import AnyArchitecture
from jaxre.training.step import State

Tree = Any


@dataclass(frozen=True)
class Initial:
    """Weights and state before the first update.

    base: frozen base of a LoRA run in the compute dtype or NF4; empty if all weights are trained.
    fresh: names of the weights of an encoder's head that were drawn at random.
    """

    architecture: AnyArchitecture
    base: Tree
    state: State | None  # None once taken
    dtype: np.dtype
    fresh: tuple[str, ...] = ()


def start_reading(config: Config, dtype: np.dtype) -> Callable[[], Loaded | None]:
    """Starts `read_model` in a thread; the returned function waits for its result or error."""
    loaded: list[Loaded | None] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            loaded.append(read_model(config, dtype))
        except BaseException as error:  # noqa: BLE001 (raised by `result`; a panic of a Rust library is no Exception)
            errors.append(error)

    # A daemon, so that a run refused meanwhile ends without waiting for it.
    thread = threading.Thread(target=read, name="weights", daemon=True)
    thread.start()

    def result() -> Loaded | None:
        thread.join()
        if errors:
            raise errors[0]
        return loaded.pop()

    return result


def read_model(config: Config, dtype: np.dtype) -> Loaded | None:
    """Loads the model at `model.path` on the host; None for the random weights of
    `model.architecture`.
    """
    if config.model.architecture is not None:
        return None
    return open_model(
        config.model.path,
        np.dtype(np.float32) if config.train.method == "full" else dtype,
        config.model.quantise,
    )


def initial_state(
    config: Config,
    dtype: np.dtype,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    dataset: Dataset | None = None,
    read: Callable[[], Loaded | None] | None = None,
) -> Initial:
    """Puts the weights on the mesh and initialises factors and moments.

    Weights come from `model.architecture` (random, by the run's seed), else from `model.path`. If
    the path has an adapter (a LoRA run, a PEFT folder), training continues from its factors. An
    encoder is fitted to the labels and entity markers of `dataset`.

    Args:
      read: returned by `start_reading`; reads the model now if None.

    Raises:
      InputError: weights that do not fit their config.json, an adapter with other settings than the
        config's `lora`, LoRA on random weights, a tokenizer with tokens that an encoder has no
        embeddings for.
    """
    full = config.train.method == "full"
    factors, fresh = None, ()
    if config.model.architecture is not None:
        if not full:
            raise InputError(
                "train.method=lora: an adapter is saved without the random weights of"
                " model.architecture; set it to full"
            )
        # Flax takes 0.3 s to import and is needed for nothing else in a run.
        from jaxre.models.module import init_weights

        architecture = architecture_of(config.model.architecture, "model.architecture")
        params = jax.tree.map(np.asarray, init_weights(architecture, config.seed))
    else:
        loaded = read() if read else read_model(config, dtype)
        architecture, params, factors = loaded.architecture, loaded.base, loaded.factors
        if factors is not None:
            check_continues(config, loaded)
        elif full and is_quantised(params):
            raise InputError(
                f"{config.model.path}: is quantised, which full fine-tuning cannot change; name the"
                " model it was made from"
            )
    if isinstance(architecture, EncoderArchitecture):
        tokens = set(dataset.tokenizer.get_vocab().values())
        check_vocabulary(max(tokens - set(dataset.new_tokens)), architecture)
        architecture, params, fresh = for_task(
            architecture,
            params,
            max(tokens) + 1,
            dataset.new_tokens,
            dataset.schema.labels,
            config.seed,
        )
    if full:
        trainable, base = params, {}
        shardings = sharding.base_shardings(architecture, mesh)
    else:
        if factors is None:
            factors = init_adapter(architecture, config.lora, jax.random.key(config.seed))
        trainable = jax.tree.map(np.asarray, factors)
        params = activations_for(params, mesh.devices.flat[0].platform)
        dense = sharding.base_shardings(architecture, mesh)
        base = sharding.put(params, sharding.quantised_shardings(params, dense, mesh))
        base = stored_for_kernels(base, config.kernels, table_kind(mesh))
        shardings = sharding.adapter_shardings(architecture, config.lora, trainable, mesh)
    trainable = sharding.put(trainable, shardings)
    shapes = jax.eval_shape(optimiser.init, trainable)
    moments = jax.jit(
        optimiser.init,
        out_shardings=sharding.optimiser_shardings(optimiser, shapes, shardings, mesh),
    )(trainable)
    step = sharding.put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return Initial(architecture, base, State(step, trainable, moments), dtype, fresh)


def stored_for_kernels(base: Tree, kernels: Kernels, device_kind: str | None) -> Tree:
    """Packs the NF4 projections of a base for the LoRA kernel of the config, else of the table.

    Raises InputError for a projection that the config's kernel does not support; the table's kernel
    does not run for such a projection, which stays as it is.
    """
    pack = jax.jit(functools.partial(stored, implementation=kernels.lora or nf4_form(device_kind)))

    def packed(weight: NF4Weight) -> NF4Weight | NF4Tiles:
        try:
            return pack(weight)
        except ValueError as error:
            if kernels.lora is None:
                return weight
            raise InputError(f"kernels.lora={kernels.lora}: {error}") from None

    return jax.tree.map(lambda leaf: packed(leaf) if is_nf4(leaf) else leaf, base, is_leaf=is_nf4)


def check_continues(config: Config, loaded: Loaded) -> None:
    """Raises InputError unless a LoRA run can continue from the adapter at `model.path`."""
    path = config.model.path
    if config.train.method == "full":
        raise InputError(
            f"{path}: has an adapter, which full fine-tuning would leave out; merge it first: jaxre"
            f" convert {path} TARGET --to hf --merge"
        )
    if loaded.kind == "run" and config.model.quantise != loaded.quantise:
        raise InputError(
            f"model.quantise: {config.model.quantise} here, but the adapter of {path} was trained"
            f" with {loaded.quantise}; set it to that"
        )
    for name in ("rank", "alpha", "rslora", "targets"):
        ours, theirs = getattr(config.lora, name), getattr(loaded.lora, name)
        if (set(ours) != set(theirs)) if name == "targets" else ours != theirs:
            raise InputError(
                f"lora.{name}: {ours} here, but the adapter of {path} has {theirs}; set it to that,"
                " or merge the adapter first"
            )


def check_tokens(dataset: Dataset, architecture: AnyArchitecture) -> None:
    """Raises InputError for a token without an embedding (a gather would read another token's), or
    for an example longer than the model reads.
    """
    for name, split in (("training", dataset.train), ("validation", dataset.validation)):
        if split is None:
            continue
        check_vocabulary(int(split.tokens.tokens.max()), architecture)
        longest = int(split.tokens.lengths.max())
        if longest > architecture.max_length:
            raise InputError(
                f"an example of the {name} data takes {longest} tokens, the model reads"
                f" {architecture.max_length}; lower train.row_length to that, and longer ones are"
                " dropped and listed"
            )
