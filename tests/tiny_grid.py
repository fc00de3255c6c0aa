"""A tiny study: a random model and two small datasets, one of the shipped corpus and one of our own
sentences.
"""

from __future__ import annotations

from pathlib import Path

from tiny_encoders import write_sentences

from jaxre.config import check_settings
from jaxre.study.settings import StudyConfig


def study_tree(folder: Path, model: Path) -> dict:
    """Settings of a run of two updates on both datasets, with one prompt style, and baselines."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": 30, "verbs": 12}.items()):
        write_sentences(folder / f"{split}.jsonl", count, seed)
    # The name of a file is that of its dataset.
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train.jsonl").rename(folder / "train" / "verbs.jsonl")
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "base": {
            "data": {"cache": str(folder / "cache")},
            "prompt": {"system": None, "user": "{marked}\n{head} -> {tail}:"},
            "lora": {"rank": 2, "alpha": 4},
            "train": {
                "epochs": 1,
                "max_steps": 2,
                "batch_tokens": 512,
                "row_length": 128,
                "learning_rate": 1e-2,
                "log_every": 1,
            },
        },
        "models": {"tiny": {"model": {"path": str(model)}}},
        "datasets": {
            "facts": {
                "train": {"dataset": "facts", "split": "train", "limit": 30},
                "test": {"dataset": "facts", "split": "test", "limit": 12},
            },
            "verbs": {
                "train": {"dataset": str(folder / "train" / "verbs.jsonl")},
                "test": {"dataset": str(folder / "verbs.jsonl")},
                "labels": ["came_from", "founded", "none"],
            },
        },
        "regimes": {"both": {"datasets": ["facts", "verbs"]}},
        "baselines": True,
        "evaluation": {"prompts": {"generic": {}}},
    }


def study_of(tree: dict) -> StudyConfig:
    return check_settings(StudyConfig, tree, "tiny")
