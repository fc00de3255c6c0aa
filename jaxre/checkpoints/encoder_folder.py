"""Encoder-specific parts of Hugging Face folders: tensor names with and without prefix, optional
heads, fields of config.json.

BERT and RoBERTa folders name a weight in several ways: a bare `BertModel` writes `embeddings...`, a
model with a head `bert.embeddings...`, and conversions of the first checkpoints call a norm's
weight and bias gamma and beta.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxre.errors import InputError
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.weights import ENCODER

# Buffers that follow from config.json, and pretraining heads; transformers drops both from a
# classifier too.
UNUSED = {
    "bert": re.compile(r"bert\.embeddings\.position_ids|cls\..*"),
    "roberta": re.compile(
        r"roberta\.embeddings\.(position_ids|token_type_ids)|roberta\.pooler\..*|lm_head\..*"
    ),
}
BUFFERS = ("position_ids", "token_type_ids")
BARE = {"bert": "BertModel", "roberta": "RobertaModel"}
CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}


def stored_names(
    architecture: EncoderArchitecture, stored: Iterable[str], place: Path
) -> dict[str, str]:
    """Name in the weight table -> name in the folder, of each stored tensor that a classifier uses.

    Raises:
      InputError: two tensors for one weight; the message starts with `place`.
    """
    names, duplicates = {}, []
    for name in stored:
        ours = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        ours = ours.replace("LayerNorm.beta", "LayerNorm.bias")
        if ours.startswith(("embeddings.", "encoder.", "pooler.")):
            ours = f"{architecture.kind}.{ours}"
        if UNUSED[architecture.kind].fullmatch(ours):
            continue
        if ours in names:
            duplicates.append(f"{names[ours]} and {name} are one weight")
        names[ours] = name
    if duplicates:
        raise InputError(f"{place}: {'; '.join(duplicates)}; keep one of them")
    return names


def with_head_of(architecture: EncoderArchitecture, names: Iterable[str]) -> EncoderArchitecture:
    """The architecture with those parts of the head that are in `names` (the weight table's or
    Hugging Face's).
    """
    names = set(names)
    has = {
        row.name: row.name in names or row.hf in names
        for row in ENCODER[architecture.kind]
        if row.switch
    }
    labels = architecture.labels if has["classifier"] else ()
    return dataclasses.replace(architecture, labels=labels, dense=bool(labels) or has["dense"])


def classifier_fields(architecture: EncoderArchitecture) -> dict[str, Any]:
    """The fields of config.json that depend on the weights: vocabulary, labels, and a class with or
    without head.
    """
    fields: dict[str, Any] = {
        "vocab_size": architecture.vocabulary,
        "architectures": [BARE[architecture.kind]],
    }
    if architecture.labels:
        fields |= {
            "architectures": [CLASSES[architecture.kind]],
            "problem_type": "single_label_classification",
            "id2label": {str(number): label for number, label in enumerate(architecture.labels)},
            "label2id": {label: number for number, label in enumerate(architecture.labels)},
        }
    return fields
