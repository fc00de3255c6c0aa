"""Compares llama.cpp's answers on an exported file with jaxre's.

    jaxre predict RUN --mode generate --output answers
    jaxre convert RUN exported --to gguf --merge
    pip install llama-cpp-python        # compiles llama.cpp: minutes, in an environment of its own
    python tools/check_llama_cpp.py exported/exported.gguf answers.csv

llama.cpp tokenises and answers each prompt (greedy, its own end of turn); the first line must equal
that of `generated_relation`, and the number of prompt tokens must match. Exit code 1 if any
differs. Imports nothing of jaxre.
"""

from __future__ import annotations

import argparse
import csv
import sys

import llama_cpp


def answer(model: llama_cpp.Llama, tokens: list[int], most: int) -> str:
    """The greedy answer to prompt tokens, without its end token."""
    new: list[int] = []
    for token in model.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
        if token == model.token_eos() or len(new) == most:
            break
        new.append(token)
    return model.detokenize(new).decode("utf-8", "replace").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("answers", help="CSV of jaxre predict --mode generate")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    with open(options.answers, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[: options.limit]
    model = llama_cpp.Llama(options.file, n_ctx=2048, verbose=False, seed=0)
    wrong_lengths = wrong_texts = 0
    for row in rows:
        tokens = model.tokenize(row["prompt"].encode(), add_bos=False, special=True)
        text = answer(model, tokens, options.new_tokens)
        wrong_lengths += len(tokens) != int(row["input_tokens"])
        same = text.split("\n")[0].strip() == row["generated_relation"].split("\n")[0].strip()
        wrong_texts += not same
        if not same:
            print(f"{row['example_id']}: {text!r}, jaxre {row['generated_relation']!r}")
    print(
        f"{len(rows)} prompts, llama-cpp-python {llama_cpp.__version__}: {wrong_texts} answers and"
        f" {wrong_lengths} numbers of prompt tokens differ"
    )
    sys.exit(bool(wrong_texts or wrong_lengths))


if __name__ == "__main__":
    main()
