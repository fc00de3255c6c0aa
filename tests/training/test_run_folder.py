"""A run may be resumed with other settings only if they do not change what it computes."""

from __future__ import annotations

import pytest

from jaxre.config import check_config
from jaxre.training.run_folder import first_difference

TREE = {
    "name": "a",
    "model": {"path": "facts-base"},
    "data": {"train": {"dataset": "facts", "split": "train"}},
    "train": {"batch_examples": 8},
}


def difference(place: str, value: object) -> str | None:
    """The first difference between the config and a copy with another value at a place."""
    changed = {key: dict(part) if isinstance(part, dict) else part for key, part in TREE.items()}
    *parents, last = place.split(".")
    node = changed
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return first_difference(
        check_config(TREE, "").model_dump(), check_config(changed, "").model_dump()
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("output", "elsewhere"),
        ("mesh.fsdp", 2),
        ("kernels.attention", "pallas_gpu"),
        ("kernels.lora", "xla"),
        ("data.cache", "elsewhere"),
        ("data.test", {"dataset": "facts", "split": "test"}),
        ("predict.batch_tokens", 256),
        ("train.remat", "none"),
        ("train.memory_gb", 8.0),
        ("train.log_every", 1),
        ("train.keep", 1),
        ("train.checkpoint_every", 3),
    ],
)
def test_a_setting_that_changes_no_result_is_free(place, value):
    assert difference(place, value) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("seed", 1),
        ("lora.rank", 8),
        ("train.learning_rate", 1e-3),
        ("train.batch_examples", 4),
        ("data.too_long", "error"),
        ("prompt.shots", 2),
        ("model.quantise", "nf4"),
    ],
)
def test_a_setting_that_changes_the_result_is_named(place, value):
    assert difference(place, value).startswith(f"{place} (")
