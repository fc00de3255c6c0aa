"""Every file of a tokenizer gives the same tokens, or the run stops and says where they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from jaxre.config import Source, load_config, shipped
from jaxre.data.markers import add_markers, encode_marked
from jaxre.data.tokenizer import load_tokenizer, token_ids
from jaxre.data.tokens import encode_texts
from jaxre.errors import InputError
from jaxre.objectives import load_dataset
from jaxre.relations.sources import load

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXTS = [
    "<|im_start|>user\nText: In 1895, <e1>Ada</e1> (<e2>Lovelace</e2>) isn't here.<|im_end|>",
    "user",
    "  two  spaces\n\n\tand a tab, naïve café, don't, 12345 678,9",
    "中文 ١٢٣ 🙂 e\u0301",
    "",
]


def facts() -> list[str]:
    return [example.text for example in load(Source(dataset="facts", split="test", limit=200))]


@pytest.fixture
def disagreeing(tmp_path: Path) -> Path:
    """The shipped base, with a tokenizer.json that begins every word with a space."""
    folder = tmp_path / "disagreeing"
    shutil.copytree(shipped("facts-base"), folder)
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return folder


def test_the_shipped_base_is_read_alike_with_and_without_its_config_and_by_tokenizers(
    tmp_path: Path,
) -> None:
    """PEFT's adapter folders have no config.json, and other programs read tokenizer.json alone."""
    base = shipped("facts-base")
    for name in FILES:
        shutil.copyfile(base / name, tmp_path / name)
    stated = Tokenizer.from_file(str(base / "tokenizer.json"))
    with_config, without = map(AutoTokenizer.from_pretrained, (base, tmp_path))
    for text in TEXTS + facts():
        ids = with_config(text, add_special_tokens=False)["input_ids"]
        assert ids == without(text, add_special_tokens=False)["input_ids"]
        assert ids == stated.encode(text, add_special_tokens=False).ids
    assert with_config.tokenize("user Text") == ["us", "er", "ĠText"]


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-0.5B-Instruct",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "FacebookAI/roberta-base",
        "karpathy/stories260K/hf",
    ],
)
def test_real_tokenizers_agree_with_their_files(name: str, shared_models: Path) -> None:
    tokenizer = load_tokenizer(shared_models / name)
    stated = Tokenizer.from_file(str(shared_models / name / "tokenizer.json"))
    texts = [*TEXTS[:3], "中文 🙂 e\u0301", "", *facts()]
    assert token_ids(tokenizer, texts) == [
        stated.encode(text, add_special_tokens=False).ids for text in texts
    ]


def test_smollm2_is_built_without_its_rule_for_digits_which_shows_in_other_scripts(
    shared_models: Path,
) -> None:
    """Its merges keep ASCII digits apart anyway; only the texts can tell. transformers 5.24."""
    tokenizer = load_tokenizer(shared_models / "HuggingFaceTB" / "SmolLM2-360M-Instruct")
    assert tokenizer.stated is not None
    with pytest.raises(InputError, match=r"GPT2Tokenizer.*tokenizer\.json"):
        token_ids(tokenizer, ["in 1895", "in ١٨٩٥"])


def test_a_folder_whose_files_disagree_is_refused_where_the_data_shows_it(
    disagreeing: Path,
) -> None:
    tokenizer = load_tokenizer(disagreeing)
    assert token_ids(tokenizer, [" wrote"]) == [[tokenizer.convert_tokens_to_ids("Ġwrote")]]
    with pytest.raises(InputError, match="disagree on the tokens of 'user'") as error:
        token_ids(tokenizer, [" wrote", "user"])
    assert "Qwen2Tokenizer" in str(error.value) and "'Ġuser'" in str(error.value)
    assert str(disagreeing) in str(error.value)


def test_every_objective_compares_the_files_on_its_data(disagreeing: Path, tmp_path: Path) -> None:
    config = load_config(
        "configs/quickstart.yaml",
        [f"model.path={disagreeing}", f"data.cache={tmp_path / 'cache'}", "data.train.limit=20"],
    )
    with pytest.raises(InputError, match="disagree"):
        load_dataset(config, disagreeing)
    tokenizer = load_tokenizer(disagreeing)
    with pytest.raises(InputError, match="disagree"):
        encode_texts([("a", "Ada wrote the Notes")], tokenizer, 64)


def test_markers_are_added_to_the_tokenizer_of_the_file_too(shared_models: Path) -> None:
    folder = shared_models / "FacebookAI" / "roberta-base"
    tokenizer = load_tokenizer(folder)
    tokenizer.stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    examples = load(Source(dataset="facts", split="test", limit=5))
    add_markers(tokenizer, examples)
    encoded = encode_marked(examples, ["[E1] Ada [/E1] and [E2] Bob [/E2]"] * 5, tokenizer)
    assert len(encoded) == 5
    tokenizer.stated.add_tokens([AddedToken("Bob", normalized=False)])
    with pytest.raises(InputError, match="disagree"):
        encode_marked(examples, ["[E1] Ada [/E1] and [E2] Bob [/E2]"] * 5, tokenizer)
