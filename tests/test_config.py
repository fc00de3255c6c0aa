"""A config is read as it was written, or refused in one line that names the place and the fix."""

from __future__ import annotations

import copy
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from jaxre.config import Config, Data, Lora, check_config, load_config, parse_yaml, save_config
from jaxre.relations import semeval

PLAIN = """
name: plain
model: {path: some/model}
data: {train: {dataset: facts}}
train: {batch_tokens: 1024}
"""
TREE = {
    "name": "plain",
    "model": {"path": "some/model"},
    "data": {"train": {"dataset": "facts"}},
    "train": {"batch_tokens": 1024},
}


def write(folder: Path, text: str | bytes = PLAIN) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def with_value(key: str, value: object) -> dict:
    tree = copy.deepcopy(TREE)
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.trian", "data.train"),
        ("data.train.datset", "data.train.dataset"),
        ("data.validation.split_name", "data.validation.split"),
        ("lora.rnak", "lora.rank"),
        ("trian", "train"),
        ("rank", "lora.rank"),
        ("train.rank", "lora.rank"),
        ("learning_rate", "train.learning_rate"),
        ("train.learning_rat", "train.learning_rate"),
        ("train.batchtokens", "train.batch_tokens"),
        ("data.train.sourcs", "data.train.sources"),
        ("prompt.dates", "prompt.date"),
        ("mesh.fdsp", "mesh.fsdp"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(key: str, nearest: str) -> None:
    message = refusal(lambda: check_config(with_value(key, 1), "run.yaml"))
    assert message == f"run.yaml: {key}: unknown key; the nearest valid key is {nearest}"


def test_an_unknown_key_in_a_list_is_named_before_what_it_leaves_missing() -> None:
    tree = with_value("data.text", {"sources": [{"dataset": "facts"}, {"datset": "facts"}]})
    assert (
        refusal(lambda: check_config(tree, "x"))
        == "x: data.text.sources.1.datset: unknown key; the nearest valid key is "
        + "data.text.sources.dataset"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora.rank", True, "whole number"),
        ("lora.rank", "16", "whole number"),
        ("lora.rank", 16.5, "whole number"),
        ("lora.rank", 0, "greater than or equal to 1"),
        ("seed", True, "whole number"),
        ("seed", -1, "greater than or equal to 0"),
        ("mesh.data", True, "whole number"),
        ("data.train.limit", True, "whole number"),
        ("data.train.limit", 0, "greater than or equal to 1"),
        ("data.train.part", [True, 1.0], "a number"),
        ("data.train.part", [0.5, 0.2], "start < end"),
        ("data.train.part", [0.5, 1.2], "less than or equal to 1"),
        ("data.train.part", [0.5], "missing"),
        ("lora.dropout", True, "a number"),
        ("lora.dropout", 1.0, "less than 1"),
        ("train.learning_rate", float("nan"), "finite"),
        ("train.learning_rate", float("inf"), "finite"),
        ("train.learning_rate", "fast", "a number"),
        ("prompt.enumerate", 1, "true or false"),
        ("prompt.enumerate", "yes", "true or false"),
        ("prompt.date", "2026-02-30", "YYYY-MM-DD"),
        ("prompt.date", "20260201", "YYYY-MM-DD"),
        ("prompt.date", "today", "YYYY-MM-DD"),
        ("prompt.user", 7, "quotes"),
        ("name", "../x", "pattern"),
        ("data.train", "facts", "mapping"),
        ("train", None, "mapping"),
        ("data.labels", "born_in", "a list"),
        ("data.labels", [], "needs labels"),
        ("data.labels", ["a", " "], "none of them empty"),
        ("data.labels", ["a", "b", "a"], "'a' is listed twice"),
        ("data.labels", ["a", True], "quotes"),
        ("data.labels", ["a", 1.5], "quotes"),
        ("data.labels", ["a", None], "quotes"),
        ("data.labels", {}, "names no dataset"),
        ("data.labels", {"facts": "born_in"}, "data.labels.facts: should be a list"),
        ("data.labels", {"facts": ["a", "a"]}, "data.labels.facts: the label 'a' is listed twice"),
        ("data.labels", {"facts": {"datset": "facts"}}, "data.labels.facts.datset: unknown key"),
        ("data.train", {"sources": []}, "data.train.sources: should not be empty"),
        (
            "data.train",
            {"sources": [{"dataset": "facts"}], "split": "train"},
            "data.train.split: unknown key; a mixture has it in each",
        ),
        (
            "data.train",
            {"sources": [{"dataset": "facts"}], "balance": "all"},
            "data.train.balance: Input should be 'none' or 'domains'",
        ),
        ("data.text", {"paths": "litbank"}, "a list"),
        ("lora.targets", ["q", "x"], "'q', 'k', 'v'"),
        ("lora.targets", [], "at least one"),
        ("lora.targets", ["q", "q"], "each once"),
        ("train.batch_tokens", 1000, "not a multiple of row_length"),
        ("train.batch_tokens", None, "exactly one of batch_examples and batch_tokens"),
        ("train.batch_examples", 8, "exactly one of batch_examples and batch_tokens"),
        ("train.objective", "lm", "needs data.text"),
        ("data.train", None, "needs data.train"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(key: str, value: object, expected: str) -> None:
    message = refusal(lambda: check_config(with_value(key, value), "run.yaml"))
    assert message.startswith("run.yaml: ") and expected in message
    assert key in message or key.split(".")[0] in message


def test_a_missing_key_is_named() -> None:
    tree = {key: value for key, value in TREE.items() if key != "model"}
    assert refusal(lambda: check_config(tree, "run.yaml")) == "run.yaml: model: missing; add it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a mapping of keys to values"),
        ("- a\n", "a mapping of keys to values"),
        (PLAIN + "seed: [1\n", "not valid YAML"),
        (PLAIN + "seed: 1\nseed: 2\n", ":7: not valid YAML: key 'seed' occurs twice"),
        (PLAIN + "? [a, b]\n: c\n", "a key must be a plain word"),
        (PLAIN + "--- \nname: other\n", "not valid YAML"),
        (PLAIN + "output: !!python/object:os.system {}\n", "not valid YAML"),
        (PLAIN + "lora: &loop {rank: *loop}\n", "refers to itself"),
        (PLAIN + "output: " + "[" * 5000, "nested too deep"),
        (PLAIN + "output: ${name\n", "is no key of this file"),
        (PLAIN + "output: ${nowhere}\n", "nowhere"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(
    tmp_path: Path, text: str | bytes, expected: str
) -> None:
    path = write(tmp_path, text)
    message = refusal(lambda: load_config(path))
    assert message.startswith(str(path)) and expected in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refusal(lambda path=path: load_config(path)).startswith(
            f"{path}: no such config file; "
        )


RESOLVERS = [
    "${oc.env:HOME}",
    "a ${oc.env:HOME} b",
    "${ oc.env:HOME}",
    "${oc.env:${name}}",
    "${${name}:HOME}",
    "${oc.decode:'${name}'}",
]


@pytest.mark.parametrize("resolver", RESOLVERS)
@pytest.mark.parametrize(
    "place",
    [
        "output: '{}'",
        "prompt: {{system: '{}'}}",
        "data: {{labels: [a, '{}']}}",
        "data: {{text: {{sources: [{{'{}': 1}}]}}}}",
    ],
)
def test_resolvers_are_refused_wherever_they_stand(
    tmp_path: Path, resolver: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "SECRET")
    # The name is that of a resolver: `${${name}:HOME}` would otherwise put one together.
    text = (
        "name: oc.env\nmodel: {path: m}\ntrain: {batch_tokens: 1024}\n"
        + place.format(resolver.replace("'", "''"))
        + "\n"
    )
    message = refusal(lambda: load_config(write(tmp_path, text)))
    assert "resolver" in message and "SECRET" not in message


@pytest.mark.parametrize("resolver", RESOLVERS)
@pytest.mark.parametrize("override", ["output={}", "data.labels=[a,'{}']", "prompt.system='{}'"])
def test_resolvers_are_refused_in_overrides(tmp_path: Path, resolver: str, override: str) -> None:
    given = override.format(resolver.replace("'", "''") if "'" in override else f'"{resolver}"')
    assert "resolver" in refusal(lambda: load_config(write(tmp_path), ["name=oc.env", given]))


def test_a_key_of_the_same_file_may_be_referred_to(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        PLAIN
        + "output: runs/${name}-${lora.rank}\nlora: {rank: 4}\nprompt: {system: 'a \\${name}'}\n",
    )
    loaded = load_config(path, ["lora.rank=8"])
    assert loaded.output == "runs/plain-8" and loaded.prompt.system == "a ${name}"


def test_labels_are_the_strings_that_were_written(tmp_path: Path) -> None:
    written = [
        "no",
        "yes",
        "on",
        "off",
        "1",
        "007",
        "0x1F",
        "1_000",
        "12:30",
        "-5",
        "2026-01-01",
        "y",
        "null-1",
        "N/A",
    ]
    path = write(tmp_path, PLAIN.replace("data: {", f"data: {{labels: [{', '.join(written)}], "))
    assert load_config(path).data.labels == tuple(written)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+.1e-3", "10e-5"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert load_config(
        write(tmp_path), [f"train.learning_rate={text}"]
    ).train.learning_rate == pytest.approx(1e-4, rel=1e-12)


def test_dates_stay_text(tmp_path: Path) -> None:
    assert (
        load_config(write(tmp_path, PLAIN + "prompt: {date: 2025-03-04}\n")).prompt.date
        == "2025-03-04"
    )
    assert load_config(write(tmp_path), ["prompt.date=2025-03-04"]).prompt.date == "2025-03-04"


def test_overrides_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN + "lora: {rank: 4, alpha: 8}\n")
    changed = load_config(
        path,
        [
            "lora.rank=32",
            "train.learning_rate=2e-4",
            "data.validation.dataset=facts",
            "prompt.system=null",
        ],
    )
    plain = load_config(path)
    assert changed.lora == plain.lora.model_copy(update={"rank": 32})
    assert changed.train == plain.train.model_copy(update={"learning_rate": 2e-4})
    assert changed.data.validation.dataset == "facts" and changed.prompt.system is None
    assert load_config(path, ["data.labels=[no, 1]"]).data.labels == ("no", "1")
    assert load_config(path, ["lora.rank=1", "lora.rank=2"]).lora.rank == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rank", "write key=value"),
        ("=5", "write key=value"),
        ("lora..rank=5", "write key=value"),
        ("lora.rnak=5", "the nearest valid key is lora.rank"),
        ("lora=5", "lora: should be a mapping"),
        ("name.first=x", "name is not a mapping"),
        ("data.labels.0=x", "data.labels is not a mapping"),
        ("data.labels=[a", "override data.labels:1: not valid YAML"),
        ("lora.rank=", "lora.rank: should be a whole number"),
        ("prompt.user={text}", "prompt.user: should be text; put it in quotes"),
    ],
)
def test_a_bad_override_is_refused_with_its_place(
    tmp_path: Path, override: str, expected: str
) -> None:
    path = write(tmp_path, PLAIN.replace("data: {", "data: {labels: [a, b], "))
    assert expected in refusal(lambda: load_config(path, [override]))


PIECES = [
    *"\\${}:'\"\n\t\r -#~é\x85\u2028",
    "${",
    "\\${",
    "name",
    "oc.env:HOME",
    "???",
    "1e5",
    "007",
    "no",
    "true",
    "2026-01-01",
    "null",
]


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    labels=st.lists(
        st.text(string.printable + "é∅", min_size=1).filter(str.strip),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    rate=st.floats(1e-30, 1e30),
)
def test_a_saved_config_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, text: str, labels: list[str], rate: float
) -> None:
    tree = with_value("prompt.user", text)
    tree["data"] |= {
        "labels": labels,
        "validation": {"dataset": "facts", "columns": {"text": text}},
    }
    tree["train"]["learning_rate"] = rate
    config = check_config(tree, "test")
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert list(path.parent.iterdir()) == [path]


def test_every_shipped_config_loads_and_survives_saving(tmp_path: Path) -> None:
    found = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert found
    for path in found:
        config = load_config(path)
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config, path


SOURCES = {"sources": [{"dataset": "facts", "limit": 3}, {"dataset": "other", "split": "train"}]}


def test_a_mixture_and_labels_of_each_dataset_survive_saving(tmp_path: Path) -> None:
    tree = with_value("data.train", SOURCES | {"balance": "domains", "limit": 5})
    tree["data"]["labels"] = {"facts": ["no", 1], "other": {"dataset": "other", "split": "test"}}
    config = check_config(tree, "test")
    assert [source.dataset for source in config.data.train.sources] == ["facts", "other"]
    assert config.data.train.sources[1].columns_key == "data.train.sources.1.columns"
    assert (
        config.data.labels["facts"] == ("no", "1")
        and config.data.labels["other"].columns_key == "data.labels.other.columns"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_what_takes_one_source_or_a_schema_for_each_says_so() -> None:
    tree = with_value("data.train", SOURCES)
    tree["data"]["labels"] = ["a"]
    assert "each dataset of a mixture has its own schema" in refusal(
        lambda: check_config(tree, "test")
    )
    tree = with_value("data.train", SOURCES)
    tree["train"] |= {"objective": "classify", "method": "full"}
    assert "one source each" in refusal(lambda: check_config(tree, "test"))


def test_semeval_configs_name_the_labels_of_the_benchmark() -> None:
    for name in ("encoder-semeval", "semeval"):
        assert set(
            load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml").data.labels
        ) == set(semeval.LABELS)


def test_a_config_cannot_be_changed() -> None:
    config = check_config(TREE, "test")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_defaults_are_the_studys() -> None:
    """paper/protocol.md, Training."""
    train = check_config(TREE, "test").train
    assert (
        train.learning_rate,
        train.schedule,
        train.warmup,
        train.weight_decay,
        train.epochs,
        train.clip_norm,
    ) == (
        1e-4,
        "linear",
        0.03,
        0.01,
        2,
        1.0,
    )
    assert (Lora().rank, Lora().alpha, Lora().dropout, len(Lora().targets)) == (16, 32.0, 0.05, 7)
    assert (
        Config.model_fields["seed"].default == 42
        and Data.model_fields["too_long"].default == "drop"
    )


def test_yaml_numbers_are_those_of_yaml_1_2() -> None:
    values = parse_yaml(
        "[0, -7, 12, 1.5, .5, 2., 1e3, -1.5E-3, 012, 1_0, 0b1, 1:30, +5, .nan, e5, 1e]", "x"
    )
    assert values == [
        0,
        -7,
        12,
        1.5,
        0.5,
        2.0,
        1000.0,
        -0.0015,
        "012",
        "1_0",
        "0b1",
        "1:30",
        "+5",
        ".nan",
        "e5",
        "1e",
    ]


def test_a_dataset_without_a_name_is_refused(tmp_path: Path) -> None:
    tree = {
        "name": "run",
        "model": {"path": "m"},
        "data": {"train": {"dataset": ""}},
        "train": {"batch_examples": 1},
    }
    assert "data.train.dataset: " in refusal(lambda: check_config(tree, "test"))
