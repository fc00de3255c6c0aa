"""Reads and writes LoRA adapters in PEFT's layout, driven by the weight table.

    save_adapter(target, architecture, lora, factors, "Qwen/Qwen2.5-0.5B-Instruct", base_folder)
    lora, factors = load_adapter(folder, architecture)

PEFT stores one 2-D pair per projection, A as [rank, in] and B as [out, rank]; ours are their
transposes, stacked over layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save_file

from jaxre.checkpoints.huggingface import (
    atomic_folder,
    copy_side_files,
    read_json,
    side_files_of,
    tensor_fault,
)
from jaxre.checkpoints.shards import is_pickled, stored_tensors
from jaxre.config import LORA_TARGETS, Lora
from jaxre.errors import InputError
from jaxre.models.architecture import Architecture, EncoderArchitecture
from jaxre.models.lora import targets
from jaxre.models.weights import Weight, table

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Fields of adapter_config.json that are read, are checked, or do not affect what is computed.
_KNOWN = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "target_modules",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    # checked
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "revision",
    # without effect
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}
# Initialisations that leave the base unchanged; pissa, olora, corda, loftq and others do not.
_HARMLESS_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
_EMPTY = ("", [], {})


def save_adapter(
    target: Path,
    architecture: Architecture,
    lora: Lora,
    factors: dict,
    base_name: str,
    base_folder: Path,
    *,
    replace: bool = False,
) -> None:
    """Writes a folder that `peft` loads, with the tokenizer of `base_folder`. It appears whole or
    not at all.

    Args:
      factors: in the layout of `models.lora.init_adapter` (numpy or jax arrays); stored in f32.
      base_name: hub id, shipped name or folder of the base; a folder is written as an absolute
        path.
      replace: replaces an existing folder.

    Raises:
      InputError: the target exists (and `replace` is off) or cannot be made.
    """
    base = Path(base_name).expanduser()
    weights = {weight.name: weight for weight in table(architecture)}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()) if base.is_dir() else base_name,
        "target_modules": [
            _module(weights[name]).rpartition(".")[2]
            for name in LORA_TARGETS
            if name in lora.targets
        ],
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors = {
        name: np.ascontiguousarray(
            np.asarray(_at(factors, architecture, weight, layer)[side], np.float32).T
        )
        for weight, layer, side, name, _ in _peft_names(architecture, lora)
    }
    with atomic_folder(target, replace=replace) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_side_files(side_files_of(base_folder), folder)


def load_adapter(folder: Path, architecture: Architecture) -> tuple[Lora, dict]:
    """An adapter's settings and factors (numpy f32, in the layout of `models.lora.init_adapter`).

    Raises:
      InputError: a missing or broken file, an unsupported feature (named), or tensors that do not
        fit the base (all listed).
    """
    folder = Path(folder)
    if isinstance(architecture, EncoderArchitecture):
        raise InputError(
            f"{folder}: its base is an encoder ({architecture.kind}), which takes no adapter;"
            " encoders are trained whole"
        )
    lora = _read_settings(folder, architecture)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(
            file.name
            for file in folder.iterdir()
            if file.stem == "adapter_model" and is_pickled(file.name)
        )
        if pickled:
            raise InputError(
                f"{folder}: only pickled weights ({pickled[0]}), which are never read; save it with"
                " peft's safe_serialization=True"
            )
        raise InputError(
            f"{path}: no such file; a PEFT adapter has {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    factors: dict = {"layers": {}, "last": {}}
    for weight, place, (*stack, inputs, outputs), _ in targets(architecture, lora):
        factors[place[0]][weight.name] = {
            "a": np.empty((*stack, inputs, lora.rank), np.float32),
            "b": np.empty((*stack, lora.rank, outputs), np.float32),
        }
    problems, stored = [], stored_tensors(path)
    for weight, layer, side, name, shape in _peft_names(architecture, lora):
        tensor = stored.pop(name, None)
        if fault := tensor_fault(tensor, shape):
            problems.append(f"{name} {fault}")
        else:
            _at(factors, architecture, weight, layer)[side][...] = tensor.read().T
    problems += [f"{name} is not known" for name in sorted(stored)]
    if problems:
        raise InputError(
            f"{path}: {'; '.join(problems)}; the adapter belongs to another base, or its tensors do"
            f" not fit {CONFIG_FILE}"
        )
    return lora, factors


def base_name_of(folder: Path) -> str:
    """The base that an adapter folder names. Raises InputError if it names none."""
    path = Path(folder) / CONFIG_FILE
    settings = read_json(path)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{path}: base_model_name_or_path is missing; write the folder or hub id of the base"
            " there"
        )
    if settings.get("revision") not in (None, "main"):
        raise InputError(
            f"{path}: revision {settings['revision']!r} of the base is not fetched; download it and"
            " name its folder as the base"
        )
    return name


def _read_settings(folder: Path, architecture: Architecture) -> Lora:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a PEFT adapter has {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type {settings.get('peft_type')!r} is not supported; LORA is"
        )
    if settings.get("task_type") not in ("CAUSAL_LM", None):
        raise InputError(
            f"{path}: task_type {settings['task_type']!r} is not supported; CAUSAL_LM is"
        )
    if unsupported := _unsupported(settings):
        raise InputError(
            f"{path}: {', '.join(unsupported)}: not supported; merge the adapter with peft"
            " (merge_and_unload) and load the merged folder"
        )
    try:
        return Lora(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings.get("lora_dropout", 0.0),
            targets=_target_names(settings.get("target_modules"), architecture, path),
            rslora=settings.get("use_rslora", False),
        )
    except KeyError as error:
        raise InputError(
            f"{path}: the field {error.args[0]} is missing; add it or save the adapter again"
        ) from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']} (given:"
            f" {problem['input']!r}); correct it"
        ) from None


def _unsupported(settings: dict[str, Any]) -> list[str]:
    """Settings that change what the adapter computes and are not supported, as `field=value`."""
    fields = [
        field
        for field, value in settings.items()
        # not 0, which may be a layer number
        if field not in _KNOWN and value is not None and value is not False and value not in _EMPTY
    ]
    if settings.get("bias", "none") != "none":
        fields.append("bias")
    for pattern, common in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = settings.get(pattern) or {}
        if not isinstance(values, dict) or any(
            value != settings.get(common) for value in values.values()
        ):
            fields.append(pattern)
    if settings.get("init_lora_weights") not in _HARMLESS_INITIAL:
        fields.append("init_lora_weights")
    return [f"{field}={json.dumps(settings[field])}" for field in fields]


def _target_names(target_modules: Any, architecture: Architecture, path: Path) -> tuple[str, ...]:
    """Our names of the projections in `target_modules`, by PEFT's rules (a list of name endings, or
    one regular expression).
    """
    rows = [weight for weight in table(architecture) if weight.lora]
    modules = {
        weight.name: [_module(weight).format(layer=layer) for layer in range(architecture.layers)]
        for weight in rows
    }
    if target_modules == "all-linear":
        return tuple(modules)
    if isinstance(target_modules, str):
        try:
            rules = [re.compile(target_modules)]
        except re.error as error:
            raise InputError(
                f"{path}: target_modules is not a regular expression ({error}); correct it or list"
                " the modules"
            ) from None
    elif (
        isinstance(target_modules, list)
        and target_modules
        and all(isinstance(ending, str) for ending in target_modules)
    ):
        rules = [re.compile(rf"(.*\.)?{re.escape(ending)}") for ending in target_modules]
    else:
        raise InputError(
            f"{path}: target_modules is {target_modules!r}; it must name at least one projection"
        )
    matched = {
        name: [any(rule.fullmatch(module) for rule in rules) for module in layers]
        for name, layers in modules.items()
    }
    if partial := [name for name, layers in matched.items() if any(layers) and not all(layers)]:
        raise InputError(
            f"{path}: target_modules takes {', '.join(partial)} of some layers only; adapters here"
            " span all layers"
        )
    all_modules = [module for layers in modules.values() for module in layers]
    if unmatched := [
        rule.pattern for rule in rules if not any(rule.fullmatch(module) for module in all_modules)
    ]:
        names = ", ".join(pattern.removeprefix(r"(.*\.)?") for pattern in unmatched)
        known = ", ".join(_module(weight).rpartition(".")[2] for weight in rows)
        raise InputError(
            f"{path}: target_modules names {names}, which LoRA does not adapt here; it adapts"
            f" {known}"
        )
    return tuple(name for name, layers in matched.items() if all(layers))


def _module(weight: Weight) -> str:
    return weight.hf.removesuffix(".weight")


def _peft_names(
    architecture: Architecture, lora: Lora
) -> Iterator[tuple[Weight, int, str, str, tuple[int, int]]]:
    """(row of the weight table, layer, side "a" or "b", PEFT's name, PEFT's shape) of each tensor
    of an adapter.
    """
    for weight in table(architecture):
        if not weight.lora or weight.name not in lora.targets:
            continue
        inputs, outputs = weight.shape(architecture)
        for layer in range(architecture.layers):
            module = f"base_model.model.{_module(weight).format(layer=layer)}"
            yield weight, layer, "a", f"{module}.lora_A.weight", (lora.rank, inputs)
            yield weight, layer, "b", f"{module}.lora_B.weight", (outputs, lora.rank)


def _at(factors: dict, architecture: Architecture, weight: Weight, layer: int) -> dict:
    """The pair {"a", "b"} of one layer; views if the factors are numpy arrays."""
    if layer == architecture.layers - 1:
        return factors["last"][weight.name]
    return {side: factors["layers"][weight.name][side][layer] for side in ("a", "b")}
