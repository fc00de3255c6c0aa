"""Our own folder: `config.json`, the tokenizer, and the pytree as it lies in memory in an Orbax (TensorStore) store.

    save_native(target, architecture, params, like=folder)
    architecture, params = load_native(folder, np.dtype("float32"))

Nothing is transposed or stacked on the way in, and an accelerator host may read the part it needs.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxre.checkpoints.encoder_folder import with_head_of
from jaxre.checkpoints.huggingface import atomic_folder, copy_side_files, read_json
from jaxre.errors import InputError
from jaxre.models.architecture import EncoderArchitecture, read_architecture
from jaxre.models.weights import AnyArchitecture, places, tree_of

MARKER, WEIGHTS, VERSION = "jaxre.json", "weights", 1


def is_native(folder: Path) -> bool:
    """Whether a folder is ours."""
    return (folder / MARKER).is_file()


def save_native(target: Path, architecture: AnyArchitecture, params: dict, like: Path) -> None:
    """Writes the folder, whole or not at all; `like` gives config.json, tokenizer and generation config."""
    with atomic_folder(target) as folder:
        with _checkpointer() as checkpointer:
            # TensorStore holds no empty array: a model of one layer has no stack.
            stored = {name: value for name, value in params.items() if name != "layers" or architecture.layers > 1}
            checkpointer.save(folder.resolve() / WEIGHTS, args=ocp.args.PyTreeSave(stored))
        (folder / "config.json").write_text((like / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
        copy_side_files(like, folder)
        (folder / MARKER).write_text(json.dumps({"format": "jaxre weights", "version": VERSION}) + "\n", encoding="utf-8")


def load_native(folder: Path, dtype: np.dtype | None = None) -> tuple[AnyArchitecture, dict]:
    """Architecture and weights (numpy) of our folder.

    Args:
      dtype: of the arrays; as stored if not given.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all listed).
    """
    version = read_json(folder / MARKER).get("version")
    if version != VERSION:
        raise InputError(
            f"{folder / MARKER}: version {version!r} is not known, this jaxre reads {VERSION}; convert the Hugging Face folder again"
        )
    architecture = read_architecture(folder)
    path = folder.resolve() / WEIGHTS
    try:
        with _checkpointer() as checkpointer:
            found = _flat(checkpointer.metadata(path).item_metadata.tree)
            if isinstance(architecture, EncoderArchitecture):
                architecture = with_head_of(architecture, found)
            _check_shapes(folder, architecture, {name: tuple(leaf.shape) for name, leaf in found.items()})
            # The form of what is stored, in plain numpy: no device sees the weights here.
            arguments = tree_of((tuple(name.split(".")), ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)) for name in found)
            stored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path}: the store cannot be read ({reason}); convert the Hugging Face folder again") from None
    if architecture.layers == 1:
        stored["layers"] = {
            p[1]: np.zeros(shape, stored["last"][p[1]].dtype) for _, p, shape, _ in places(architecture) if p[0] == "layers"
        }
    return architecture, stored


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))


def _flat(tree: dict) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_shapes(folder: Path, architecture: AnyArchitecture, found: dict[str, tuple[int, ...]]) -> None:
    expected = {".".join(path): shape for _, path, shape, _ in places(architecture) if 0 not in shape}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise InputError(f"{folder / WEIGHTS}: {'; '.join(problems)}; the weights do not fit config.json")
