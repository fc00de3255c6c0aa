"""Opens any kind of model, for training, prediction and conversion.

    loaded = open_model("runs/quickstart", compute_dtype("auto"))

The kind of a folder follows from the first of these files: `jaxre.json` (jaxre), `gguf.json` (an
unpacked GGUF file), `adapter_config.json` (a PEFT adapter), `config.json` (Hugging Face),
`config.yaml` (a run). Anything else is a GGUF file, a named base or a hub id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxre.checkpoints.gguf import file_of, is_gguf, is_gguf_file, open_gguf, unpacked
from jaxre.checkpoints.huggingface import Tensors, gathered, open_base, quantised, read_json
from jaxre.checkpoints.native import is_native, load_native, open_native
from jaxre.checkpoints.packaged import PACKAGED, check_packaged, packaged_file
from jaxre.checkpoints.peft import CONFIG_FILE, base_name_of, load_adapter
from jaxre.checkpoints.shards import CONVERT_PICKLED, is_pickled
from jaxre.config import Config, Lora, load_config, shipped
from jaxre.errors import InputError, first_line
from jaxre.models.architecture import ENCODERS, KINDS
from jaxre.models.weights import AnyArchitecture
from jaxre.product_rates import product_rates

CPU_DTYPE = "JAXRE_CPU_DTYPE"  # sets model.dtype=auto on a CPU, without measuring

Kind = Literal["jaxre", "gguf", "peft", "hf", "run"]


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    folder: has its tokenizer and config.json.
    name: for tables and messages.
    base: weights without the adapter (numpy, our layout).
    lora, factors, adapter: settings, factors (numpy f32) and folder of the adapter, if any.
    kind: of the model that was opened.
    base_name: the base that the adapter names.
    quantise: how a dense base was quantised.
    """

    folder: Path
    name: str
    architecture: AnyArchitecture
    base: dict[str, Any]
    lora: Lora | None = None
    factors: dict[str, Any] | None = None
    kind: Kind = "hf"
    base_name: str | None = None
    quantise: str | None = None
    adapter: Path | None = None


def resolve_model(path: str) -> Path:
    """The local folder of a model: a folder, a base shipped with jaxre or inside a package, an
    unpacked GGUF file, or a hub snapshot.

    Raises:
      InputError: none of these, or a file that does not open.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = list(folder.glob("*.gguf"))
        known = ("jaxre.json", "gguf.json", CONFIG_FILE, "config.json", "config.yaml")
        if not files or any((folder / name).is_file() for name in known):
            return folder
        if len(files) > 1:
            raise InputError(f"{folder}: holds {len(files)} GGUF files; name one of them")
        return unpacked(files[0])
    if path in PACKAGED:
        file = packaged_file(path)
        return unpacked(file, lambda: check_packaged(path, file))
    if shipped(path).is_dir() and "/" not in path:
        return shipped(path)
    if folder.is_file() and is_gguf_file(folder):
        return unpacked(folder)
    if folder.is_file():
        if is_pickled(folder.name):
            raise InputError(
                f"{path}: holds pickled weights, which are never read; {CONVERT_PICKLED}"
            )
        raise InputError(f"{path}: is a file; give its folder")
    if path.count("/") != 1 or path.startswith((".", "/", "~", "runs/")):
        raise InputError(
            f"{path}: no such run or model folder; give a folder, a GGUF file, a hub id OWNER/NAME,"
            f" {', '.join(PACKAGED)}, or the shipped facts-base"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{path}: not a folder, and the hub did not give it ({first_line(error)}); download it"
            " and give the folder"
        ) from None


class Chosen(NamedTuple):
    """A dtype of base weights and products, and the reason in words; empty if the user set it."""

    dtype: np.dtype
    why: str = ""


def compute_dtype(setting: Literal["auto", "float32", "bfloat16"]) -> np.dtype:
    """The dtype that `chosen_dtype` chooses."""
    return chosen_dtype(setting).dtype


def dtype_of(config: Config) -> Chosen:
    """The dtype of base weights and products of a run, and why."""
    on_cpu = config.model.dtype == "auto" and jax.default_backend() == "cpu"
    if on_cpu and config.train.method == "full":
        return _chosen("float32", "float32: a CPU that trains all weights keeps to it")
    if on_cpu and config.model.quantise:
        return _chosen("float32", "float32: NF4 weights are multiplied in it on a CPU")
    return chosen_dtype(config.model.dtype)


def chosen_dtype(setting: Literal["auto", "float32", "bfloat16"]) -> Chosen:
    """The dtype of base weights and products of a decoder without full fine-tuning, and why.

    auto is bfloat16 on an accelerator. On a CPU it is JAXRE_CPU_DTYPE if set, else the faster of
    the two, measured once (`jaxre.product_rates`); but float32 with several processes, each of
    which would measure for itself.
    """
    if setting != "auto":
        return _chosen(setting)
    if jax.default_backend() != "cpu":
        return _chosen("bfloat16", "bfloat16: an accelerator is there")
    if (name := os.environ.get(CPU_DTYPE)) is not None:
        if name not in ("float32", "bfloat16"):
            raise InputError(
                f"{CPU_DTYPE}={name}: no such dtype; set float32 or bfloat16, or unset it"
            )
        return _chosen(name, f"{name}: {CPU_DTYPE} says so")
    if jax.process_count() > 1:
        return _chosen("float32", "float32: several processes with CPU cores alone")
    rates = product_rates()
    return _chosen(rates.faster, rates.words())


def _chosen(name: str, why: str = "") -> Chosen:
    return Chosen(np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32), why)


@dataclass(frozen=True)
class Located:
    """Locations of a model's parts: `folder` has the base weights, `adapter` the adapter, if any.
    The other fields are as in Loaded.
    """

    folder: Path
    name: str
    kind: Kind
    adapter: Path | None = None
    base_name: str | None = None
    quantise: str | None = None


def locate(path: str | Path, quantise: str | None = None) -> Located:
    """Locates the parts of a model without reading weights.

    Args:
      path: a Hugging Face folder, a jaxre folder, a GGUF file, a PEFT adapter, a run folder, the
        name of a base or a hub id.
      quantise: "nf4" for a base with NF4 projections; a run with an adapter uses its own setting,
        because its adapter was trained on that base.

    Raises:
      InputError: none of these, or an unfinished run.
    """
    folder = resolve_model(str(path))
    kind = kind_of(folder)
    local = Path(path).expanduser()
    name = local.absolute().name if local.is_dir() else str(path)
    name = local.stem if local.is_file() else name
    if kind == "peft":
        return _with_adapter(folder, folder, name, kind, quantise)
    if kind == "run":
        config = load_config(folder / "config.yaml")
        check_finished(folder, config)
        if config.train.method == "full":
            return Located(folder / "model", config.name, kind, quantise=quantise)
        return _with_adapter(folder, folder / "adapter", config.name, kind, config.model.quantise)
    return Located(folder, name, kind, quantise=quantise)


def open_weights(folder: Path, quantise: str | None = None) -> Tensors:
    """Opens the base weights of a folder, to be read one at a time. Raises InputError for weights
    that do not fit.
    """
    open_folder = open_native if is_native(folder) else open_gguf if is_gguf(folder) else open_base
    tensors = open_folder(folder)
    return quantised(tensors, folder) if quantise else tensors


def open_model(path: str | Path, dtype: np.dtype | None, quantise: str | None = None) -> Loaded:
    """Loads a model's architecture, base weights and adapter.

    Args:
      path, quantise: as for `locate`.
      dtype: of the dense base weights; None keeps the stored dtype.

    Raises:
      InputError: no such model, an unfinished run, or weights that do not fit.
    """
    model = locate(path, quantise)
    if is_native(model.folder):
        architecture, base = load_native(model.folder, dtype, model.quantise)
    else:
        tensors = open_weights(model.folder, model.quantise)
        architecture, base = gathered(tensors, dtype, model.folder)
    lora = factors = None
    if model.adapter is not None:
        lora, factors = load_adapter(model.adapter, architecture)
    return Loaded(**vars(model), architecture=architecture, base=base, lora=lora, factors=factors)


def kind_of(folder: Path) -> Kind:
    """The kind of model in a folder. Raises InputError if there is none."""
    if is_native(folder):
        return "jaxre"
    if is_gguf(folder):
        return "gguf"
    if (folder / CONFIG_FILE).is_file():
        return "peft"
    if (folder / "config.json").is_file():
        return "hf"
    if (folder / "config.yaml").is_file():
        return "run"
    raise InputError(
        f"{folder}: not a model; it has none of config.json (Hugging Face), {CONFIG_FILE} (PEFT),"
        " jaxre.json, config.yaml (a run)"
    )


def tokenizer_folder(config: Config) -> Path:
    """The folder whose tokenizer a run uses: that of its base, or `model.path` itself if the run
    trains from scratch.

    Raises:
      InputError: no such model, or an objective for the other kind of model (decoder, encoder).
    """
    scratch = config.model.architecture
    folder = base_of(config.model.path)[1] if scratch is None else resolve_model(config.model.path)
    kind = (scratch or read_json(folder / "config.json")).get("model_type")
    if kind in ENCODERS and config.train.objective != "classify":
        raise InputError(
            f"{config.model.path}: is an encoder ({kind}); set train.objective=classify and"
            " train.method=full"
        )
    if kind in KINDS and config.train.objective == "classify":
        raise InputError(
            f"{config.model.path}: is a decoder ({kind}); train.objective=classify takes an encoder"
            f" ({', '.join(ENCODERS)})"
        )
    return folder


def check_finished(folder: Path, config: Config) -> None:
    """Raises InputError for a run that has no result yet."""
    result = "model" if config.train.method == "full" else "adapter"
    if not (folder / result).is_dir():
        raise InputError(
            f"{folder}: this run has no {result}/ yet; finish it with: jaxre train"
            f" {folder / 'config.yaml'}"
        )
    if config.train.method == "lora" and config.model.architecture is not None:
        raise InputError(
            f"{folder}: its adapter was trained on random weights that were not kept; train with"
            " train.method=full"
        )


def base_of(
    name: str, seen: frozenset[Path] = frozenset(), adapter: Path | None = None
) -> tuple[str, Path]:
    """The base weights behind a model: their name for an adapter's config (a hub id, else the
    absolute folder), and their folder.

    A run that starts from an adapter continues that adapter, so both have the same base.

    Args:
      seen: folders already followed.
      adapter: the PEFT folder that names this base; PEFT adapters do not stack.

    Raises:
      InputError: the chain of bases is broken or circular, or an adapter's base is an adapter.
    """
    folder = resolve_model(name)
    if folder.resolve() in seen:
        raise InputError(
            f"{folder}: is named as the base of itself; name the folder of the base weights"
        )
    seen = seen | {folder.resolve()}
    kind = kind_of(folder)
    if kind == "gguf":
        return name if name in PACKAGED else str(file_of(folder)), folder
    if kind in ("hf", "jaxre"):
        # PEFT would take the name of a shipped base for a hub id.
        is_hub_id = "/" in name and not Path(name).expanduser().is_dir()
        return name if is_hub_id else str(folder.resolve()), folder
    config = load_config(folder / "config.yaml") if kind == "run" else None
    if config:
        check_finished(folder, config)
        if config.train.method == "full":
            return str((folder / "model").resolve()), folder / "model"
    if adapter:
        raise InputError(
            f"{name}: is itself an adapter, which {adapter} on top would leave out; merge it first"
            f" with jaxre convert {name} TARGET --to hf --merge, and name TARGET as"
            " base_model_name_or_path"
        )
    if config:
        return base_of(config.model.path, seen)
    return base_of(base_name_of(folder), seen, folder)


def _with_adapter(
    source: Path, adapter: Path, name: str, kind: Kind, quantise: str | None
) -> Located:
    try:
        base_name, folder = base_of(str(source))
    except InputError as error:
        raise InputError(f"{adapter}: its base does not open: {error}") from None
    return Located(folder, name, kind, adapter, base_name, quantise)
