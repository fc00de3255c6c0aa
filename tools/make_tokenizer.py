"""Trains the tokenizer of the shipped base: byte-level BPE with a ChatML template.

    python tools/make_tokenizer.py configs/facts-base.yaml TARGET_FOLDER [VOCABULARY]

It reads the same texts as the language-model run of the config. `<e1>`, `</e1>`, `<e2>`, `</e2>`,
which mark head and tail in a prompt, are tokens of their own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from jaxre.config import Prompt, load_config
from jaxre.data.tokens import read_texts
from jaxre.relations.sources import load

PROMPT = Prompt()

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<e1>", "</e1>", "<e2>", "</e2>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def main(config_path: str, target: str, vocabulary: str = "8192") -> None:
    config = load_config(config_path)
    texts = sorted({document for _, document in read_texts(config.data.text)})
    labels = sorted(
        {example.relation for source in config.data.text.sources for example in load(source)}
    )
    # What every prompt repeats (roles, fields, labels) would else be spelled in pieces.
    texts += [f"system {PROMPT.system} user {PROMPT.user} assistant {' '.join(labels)}"] * 200
    # Plain: a mark that takes the space before it (lstrip) cannot be written to GGUF.
    marks = [AddedToken(mark, normalized=False) for mark in MARKS]
    # The normaliser and pre-tokenizer that transformers builds for every Qwen2 folder.
    tokenizer = Qwen2Tokenizer().backend_tokenizer
    tokenizer.model = models.BPE()
    tokenizer.add_tokens(marks)
    trainer = trainers.BpeTrainer(
        vocab_size=int(vocabulary) - len(MARKS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(marks)
    model = json.loads(tokenizer.to_str())["model"]
    wrapped = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    wrapped.add_tokens(marks)
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(target)
    sample = "The <e1>River Thames</e1> flows through <e2>London</e2> in 1895."
    print(f"{Path(target)}: {len(wrapped)} tokens; {sample!r} is {wrapped.tokenize(sample)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
