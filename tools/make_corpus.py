"""Composes the project's own relation corpus from hand-written facts and phrasings.

    python tools/make_corpus.py
        # writes jaxre/assets/corpus/{train,validation,test}.jsonl

The sources are jaxre/assets/corpus/source/*.txt; a line is one of

    labels   | forward | inverse or - | head type | tail type [| type of {other}]
    fact     | split | head | tail | pronoun of the head or - | slot=value; slot=value
    phrasing | split | text with {head}, {tail} and slots
    none     | split | marked,marked | text whose marked pair is not related

A `labels` line opens a section, the lines after it belong to it. In a text, `{slot}` is a slot of
the fact, `{a slot}` puts a or an before it, `{he} {his} {him} {parent}` follow the fact's pronoun
(`{che} {chis} {chim} {child}` the slot `cp`), and `[...]` is left out when one of its slots is
missing, or by the hash of fact and phrasing. A phrasing is used with a fact only if the fact has
its slots. A leading lower-case "the " of a name is an article: it is printed, but stays outside the
span. No random numbers: every choice is a SHA-256 of the material, so the files are the same bytes
on every machine.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CORPUS = Path(__file__).resolve().parent.parent / "jaxre" / "assets" / "corpus"
SPLITS = ("train", "validation", "test")
# Sentences per section: (pair of inverse labels, single label, hard negatives of a relation file,
# section of none.txt).
QUOTAS = {"train": (164, 98, 22, 18), "validation": (26, 15, 3, 3), "test": (44, 26, 6, 5)}
# Sentences of a pair that are used in both directions.
BOTH_WAYS = {"train": 44, "validation": 5, "test": 13}
WORDS = (8, 45)
PRONOUNS = {
    "he": {"he": "he", "his": "his", "him": "him", "parent": "father", "child": "son"},
    "she": {"he": "she", "his": "her", "him": "her", "parent": "mother", "child": "daughter"},
    "-": {},
}
MARK = {"head": "\x01", "tail": "\x02", "other": "\x03"}


@dataclass
class Section:
    """One `labels` line and everything below it; `types` maps head, tail and other to PERSON,
    PLACE, WORK or ORG.
    """

    file: str
    forward: str
    inverse: str | None
    types: dict[str, str]
    facts: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # (split, slots)
    # (split, marked pair, text)
    phrasings: list[tuple[str, tuple[str, str], str]] = field(default_factory=list)
    negatives: list[tuple[str, tuple[str, str], str]] = field(default_factory=list)


def digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "big")


def read_sections(folder: Path) -> list[Section]:
    """Reads all source files, in the order of their names. Raises ValueError, with file and line,
    on a malformed line.
    """
    sections: list[Section] = []
    for path in sorted(folder.glob("*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            cells = [cell.strip() for cell in line.split("|")]
            try:
                if cells[0] == "labels":
                    types = dict(zip(("head", "tail", "other"), cells[3:], strict=False))
                    sections.append(
                        Section(path.name, cells[1], None if cells[2] == "-" else cells[2], types)
                    )
                    continue
                section, split = sections[-1], SPLITS[SPLITS.index(cells[1])]
                if section.file != path.name:
                    raise ValueError("no labels line before it")
                if cells[0] == "fact":
                    _, _, head, tail, pronoun, *rest = cells
                    slots = (
                        dict(pair.strip().split("=", 1) for pair in rest[0].split(";"))
                        if rest and rest[0]
                        else {}
                    )
                    child = {
                        "c" + k: v
                        for k, v in PRONOUNS[slots.pop("cp", "-")].items()
                        if k != "parent" and k != "child"
                    }
                    if child:
                        child["child"] = "son" if child["che"] == "he" else "daughter"
                    own = {k: v for k, v in PRONOUNS[pronoun].items() if k != "child"}
                    section.facts.append(
                        (split, {"head": head, "tail": tail} | own | child | slots)
                    )
                elif cells[0] == "phrasing":
                    section.phrasings.append((split, ("head", "tail"), cells[2]))
                elif cells[0] == "none":
                    head, tail = cells[2].split(",")
                    section.negatives.append((split, (head, tail), cells[3]))
                else:
                    raise ValueError(f"unknown line kind {cells[0]!r}")
            except (ValueError, IndexError, KeyError) as error:
                raise ValueError(f"{path.name}:{number}: {error}: {line}") from error
    return sections


def split_article(name: str) -> tuple[str, str]:
    return ("the ", name[4:]) if name.startswith("the ") else ("", name)


def indefinite(words: str) -> str:
    vowel = words[0].lower() in "aeiou" and not re.match(r"(?i)(uni(?!m|n)|euro|one\b|u\.)", words)
    return ("an " if vowel or re.match(r"(?i)(hour|honou?r|heir)", words) else "a ") + words


def compose(phrasing: str, slots: dict[str, str]) -> tuple[str, dict[str, tuple[int, int]]] | None:
    """A sentence and the spans of its entities; None if the fact lacks a slot that the phrasing
    needs.
    """

    def has_slots(text: str) -> bool:
        return all(name.removeprefix("a ") in slots for name in re.findall(r"\{([^}]+)\}", text))

    def choose(match: re.Match) -> str:
        chosen = digest(slots["head"], slots["tail"], phrasing, match[0]) % 5 < 3
        return match[1] if chosen and has_slots(match[1]) else ""

    text = re.sub(r"\[([^\]]*)\]", choose, phrasing)
    if not has_slots(text):
        return None

    def fill(match: re.Match) -> str:
        name = match[1]
        if name in MARK:
            article, bare = split_article(slots[name])
            suffix = match[2] or ""
            if suffix and article and bare.endswith("s"):
                suffix = "'"  # the Netherlands' largest port
            return article + MARK[name] + bare + MARK[name] + suffix
        return (indefinite(slots[name[2:]]) if name.startswith("a ") else slots[name]) + (
            match[2] or ""
        )

    text = re.sub(r"\{([^}]+)\}('s)?", fill, text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub("([.][\x01-\x03]?)[.]$", r"\1", text)  # a name that ends in a full stop, as Jr.
    start = 1 if text[0] in MARK.values() else 0
    text = text[:start] + text[start].upper() + text[start + 1 :]
    spans = {}
    for name, mark in MARK.items():
        if text.count(mark) > 2:
            raise ValueError(f"{{{name}}} occurs twice: {phrasing}")
        if mark in text:
            plain = [re.sub("[\x01-\x03]", "", part) for part in text.split(mark)]
            spans[name] = (len(plain[0]), len(plain[0]) + len(plain[1]))
    return re.sub("[\x01-\x03]", "", text), spans


def pick(
    section: Section, split: str, phrasings: list, count: int
) -> Iterator[tuple[str, dict, dict, tuple[str, str], int]]:
    """Up to `count` distinct sentences, facts and phrasings used as evenly as possible.

    Yields (text, spans, slots, marked pair, how often this phrasing came before).
    """
    facts = [slots for where, slots in section.facts if where == split]
    phrasings = [(pair, text) for where, pair, text in phrasings if where == split]
    made = {}
    for f, slots in enumerate(facts):
        for p, (_, text) in enumerate(phrasings):
            sentence = compose(text, slots)
            if sentence and WORDS[0] <= len(sentence[0].split()) <= WORDS[1]:
                made[f, p] = sentence
    used_facts, used_phrasings, texts = Counter(), Counter(), set()
    order = {
        key: digest(
            section.file, facts[key[0]]["head"], facts[key[0]]["tail"], phrasings[key[1]][1]
        )
        for key in made
    }
    while made and len(texts) < count:
        key = min(
            made,
            key=lambda k: (
                used_facts[k[0]] * len(facts) + used_phrasings[k[1]] * len(phrasings),
                order[k],
            ),
        )
        text, spans = made.pop(key)
        if text in texts:
            continue
        texts.add(text)
        f, p = key
        yield (
            text,
            spans,
            facts[f],
            phrasings[p][0],
            used_phrasings[p] + digest(phrasings[p][1]) % 2,
        )
        used_facts[f] += 1
        used_phrasings[p] += 1


def make_row(section: Section, text: str, spans: dict, head: str, tail: str, relation: str) -> dict:
    (a, b), (c, d) = spans[head], spans[tail]
    return {
        "id": "",
        "text": text,
        "head": text[a:b],
        "tail": text[c:d],
        "head_span": [a, b],
        "tail_span": [c, d],
        "head_type": section.types[head],
        "tail_type": section.types[tail],
        "relation": relation,
    }


def section_rows(section: Section, split: str) -> Iterator[dict]:
    pair_count, single_count, negative_count, none_count = QUOTAS[split]
    count = (
        none_count if section.forward == "none" else pair_count if section.inverse else single_count
    )
    for i, (text, spans, _, _, turn) in enumerate(pick(section, split, section.phrasings, count)):
        if section.inverse is None:
            head, tail = (
                ("tail", "head") if section.forward == "none" and turn % 2 else ("head", "tail")
            )
            yield make_row(section, text, spans, head, tail, section.forward)
            continue
        both = (i + 1) * BOTH_WAYS[split] // count > i * BOTH_WAYS[split] // count
        if both or turn % 2 == 0:
            yield make_row(section, text, spans, "head", "tail", section.forward)
        if both or turn % 2 == 1:
            yield make_row(section, text, spans, "tail", "head", section.inverse)
    for i, (text, spans, _, marked, turn) in enumerate(
        pick(section, split, section.negatives, negative_count)
    ):
        yield make_row(section, text, spans, *(marked[::-1] if turn % 2 else marked), "none")
        # the related pair of the same sentence, as a contrast
        if i % 2 == 0 and {"head", "tail"} <= spans.keys():
            forward = section.inverse is None or i % 4 == 0
            pair = ("head", "tail") if forward else ("tail", "head")
            yield make_row(
                section, text, spans, *pair, section.forward if forward else section.inverse
            )


def compose_corpus(folder: Path) -> dict[str, list[dict]]:
    """The rows of the three splits, shuffled by hash and numbered."""
    sections = read_sections(folder)
    corpus = {}
    for split in SPLITS:
        rows = [row for section in sections for row in section_rows(section, split)]
        rows.sort(key=lambda row: digest(row["text"], row["head"], row["tail"]))
        for number, row in enumerate(rows, 1):
            row["id"] = f"facts-{split}-{number:04d}"
        corpus[split] = rows
    check(corpus)
    return corpus


def check(corpus: dict[str, list[dict]]) -> None:
    """Raises ValueError, listing all violations, if a row breaks a promise of the README."""
    faults = []
    entities = {
        split: {row[side] for row in rows for side in ("head", "tail")}
        for split, rows in corpus.items()
    }
    for rows in corpus.values():
        uses = Counter(row["text"] for row in rows)
        faults += [f"{n} rows of: {text}" for text, n in uses.items() if n > 2]
        for text in uses:
            if not WORDS[0] <= len(text.split()) <= WORDS[1]:
                faults.append(f"{len(text.split())} words: {text}")
            if re.search(r"[{}\[\]|]|\s[,.]|,,|\.\.|,\.| the the ", text):
                faults.append(f"malformed: {text}")
    for split in SPLITS:
        for other in SPLITS:
            if split == other or split == "train":
                continue
            text = "\n".join(row["text"] for row in corpus[other])
            seen = [
                name
                for name in entities[split]
                if re.search(rf"\b{re.escape(name)}(?!\w)", text, re.IGNORECASE)
            ]
            faults += [f"{split} entity occurs in {other}: {name}" for name in sorted(seen)]
    if faults:
        raise ValueError("\n".join(faults))


def write_corpus(source: Path, target: Path) -> dict[str, Path]:
    """Writes target/{train,validation,test}.jsonl from the sources and returns the paths."""
    target.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in compose_corpus(source).items():
        paths[split] = target / f"{split}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[split].write_bytes(lines.encode())
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=CORPUS / "source")
    parser.add_argument("--target", type=Path, default=CORPUS)
    arguments = parser.parse_args()
    for split, path in write_corpus(arguments.source, arguments.target).items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print(f"{split}: {len(rows)} rows, {len({row['text'] for row in rows})} sentences")
        counts = sorted(Counter(row["relation"] for row in rows).items())
        print("  " + ", ".join(f"{label} {n}" for label, n in counts))


if __name__ == "__main__":
    main()
