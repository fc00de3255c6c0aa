"""Our own folder: `config.json`, the tokenizer, and the pytree as it lies in memory in an Orbax (TensorStore) store.

    save_native(target, architecture, params, like=folder)
    architecture, params = load_native(folder, np.dtype("float32"))

The projections may be NF4: each is then stored as its four arrays. Nothing is transposed or stacked on
the way in, and an accelerator host may read the part it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxre_kernels.nf4 import NF4Weight, forms

from jaxre.checkpoints.huggingface import atomic_folder, copy_side_files, read_json
from jaxre.errors import InputError
from jaxre.models.architecture import Architecture, read_architecture
from jaxre.models.quantised import is_nf4, is_quantised, quantise_base
from jaxre.models.weights import places, tree_of

MARKER, WEIGHTS, VERSION = "jaxre.json", "weights", 1


def is_native(folder: Path) -> bool:
    """Whether a folder is ours."""
    return (folder / MARKER).is_file()


def stored_quantised(folder: Path) -> str | None:
    """How the projections of our folder are stored: "nf4", or None where they are dense."""
    return read_json(folder / MARKER).get("quantised")


def save_native(target: Path, architecture: Architecture, params: dict, like: Path) -> None:
    """Writes the folder, whole or not at all; `like` gives config.json, tokenizer and generation config."""
    with atomic_folder(target) as folder:
        with _checkpointer() as checkpointer:
            # TensorStore holds no empty array: a model of one layer has no stack.
            stored = {name: value for name, value in params.items() if name != "layers" or architecture.layers > 1}
            stored = jax.tree.map(_plain, stored, is_leaf=is_nf4)
            checkpointer.save(folder.resolve() / WEIGHTS, args=ocp.args.PyTreeSave(stored))
        (folder / "config.json").write_text((like / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
        copy_side_files(like, folder)
        marker = {"format": "jaxre weights", "version": VERSION} | ({"quantised": "nf4"} if is_quantised(params) else {})
        (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")


def load_native(folder: Path, dtype: np.dtype | None = None, quantise: str | None = None) -> tuple[Architecture, dict]:
    """Architecture and weights (numpy) of our folder.

    Args:
      dtype: of the dense arrays; as stored if not given.
      quantise: "nf4" for projections as NF4; those that are stored so are taken as they are.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all listed).
    """
    version, quantised = read_json(folder / MARKER).get("version"), stored_quantised(folder)
    if version != VERSION:
        raise InputError(
            f"{folder / MARKER}: version {version!r} is not known, this jaxre reads {VERSION}; convert the Hugging Face folder again"
        )
    if quantised not in (None, "nf4"):
        raise InputError(f"{folder / MARKER}: quantised as {quantised!r}, this jaxre reads nf4; convert the Hugging Face folder again")
    architecture = read_architecture(folder)
    path = folder.resolve() / WEIGHTS
    expected = _expected(architecture, quantised, dtype, quantise)
    try:
        with _checkpointer() as checkpointer:
            found = _flat(checkpointer.metadata(path).item_metadata.tree)
            _check_shapes(folder, expected, {name: tuple(leaf.shape) for name, leaf in found.items()})
            # The form of what is stored, in plain numpy: no device sees the weights here.
            arguments = tree_of(
                (tuple(name.split(".")), ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)) for name, (_, kind) in expected.items()
            )
            stored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path}: the store cannot be read ({reason}); convert the Hugging Face folder again") from None
    if quantised:
        for weight, (part, *_), shape, _ in places(architecture):
            if weight.lora and 0 not in shape:
                stored[part][weight.name] = NF4Weight(**stored[part][weight.name], shape=shape[:-3:-1])
    if architecture.layers == 1:
        stored["layers"] = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), stored["last"])
    if quantise and not quantised:
        stored = quantise_base(architecture, stored, str(folder))
    return architecture, stored


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))


def _flat(tree: dict) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _plain(leaf: NF4Weight | np.ndarray) -> dict[str, np.ndarray] | np.ndarray:
    return {name: getattr(leaf, name) for name in forms(leaf.shape)} if is_nf4(leaf) else leaf


def _expected(
    architecture: Architecture, quantised: str | None, dtype: np.dtype | None, quantise: str | None
) -> dict[str, tuple[tuple[int, ...], np.dtype | None]]:
    """Name in the store -> (shape, dtype to read it as)."""
    expected = {}
    for weight, path, shape, _ in places(architecture):
        if 0 in shape:
            continue  # TensorStore holds no empty array: a model of one layer has no stack
        name = ".".join(path)
        if quantised and weight.lora:
            expected |= {f"{name}.{field}": form for field, form in forms(shape[:-3:-1], shape[:-2]).items()}
        else:  # what is to be quantised is read as it is stored
            expected[name] = (shape, None if quantise and weight.lora else dtype)
    return expected


def _check_shapes(folder: Path, expected: dict[str, tuple[tuple[int, ...], Any]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, (shape, _) in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise InputError(f"{folder / WEIGHTS}: {'; '.join(problems)}; the weights do not fit config.json")
