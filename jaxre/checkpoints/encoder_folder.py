"""What encoders have of their own in a Hugging Face folder: names with and without prefix, a head
or none, its config.json.

BERT's and RoBERTa's folders name one weight in several ways: `BertModel` alone writes
`embeddings...`, a model with a head `bert.embeddings...`, and conversions of the first checkpoints
call a norm's weight and bias gamma and beta.
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

# Buffers that follow from config.json, and heads of pretraining, which transformers leaves out of a
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
    """The weight table's name -> the name in the folder, for each of its tensors but those no
    classifier has.

    Raises:
      InputError: two tensors for one weight, with `place` in front.
    """
    found, twice = {}, []
    for name in stored:
        ours = (
            f"{architecture.kind}.{name}"
            if name.startswith(("embeddings.", "encoder.", "pooler."))
            else name
        )
        ours = ours.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        if UNUSED[architecture.kind].fullmatch(ours):
            continue
        if ours in found:
            twice.append(f"{found[ours]} and {name} are one weight")
        found[ours] = name
    if twice:
        raise InputError(f"{place}: {'; '.join(twice)}; keep one of them")
    return found


def with_head_of(architecture: EncoderArchitecture, names: Iterable[str]) -> EncoderArchitecture:
    """The architecture with as much of the head as is stored under `names` (of the weight table, or
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
    """The fields of config.json that say what the weights are: vocabulary, labels, and no head
    where there is none.
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
