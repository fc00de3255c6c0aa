"""Chat turns become the tokens that transformers makes of them, and a faulty template is named,
never trained on.
"""

from __future__ import annotations

import copy
import datetime
import json
import shutil
from pathlib import Path

import pytest
from refusals import refusal
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxre.config import Prompt, Source
from jaxre.data import template as template_module
from jaxre.data.template import ChatTemplate, pin_date
from jaxre.data.tokenizer import load_tokenizer
from jaxre.relations.prompts import turns
from jaxre.relations.sources import load

DATE = "2026-01-01"
LABELS = ("Cause-Effect(e1,e2)", "no", "Other", "born in", "Ελλάδα", "per:city_of_birth")
USER = {"role": "user", "content": "Text: <e1>Ada</e1> was born in <e2>London</e2>.\nAnswer:"}
SYSTEM = {"role": "system", "content": "You are an expert."}
DEMONSTRATIONS = [
    {"role": "user", "content": "Text: <e1>A</e1> made <e2>B</e2>.\nAnswer:"},
    {"role": "assistant", "content": "made"},
    {"role": "user", "content": "Text: <e1>C</e1> saw <e2>D</e2>.\nAnswer:"},
    {"role": "assistant", "content": "none"},
]
CONVERSATIONS = ([USER], [SYSTEM, USER], [SYSTEM, *DEMONSTRATIONS, USER])

# ChatML, in pieces that the faulty templates below leave out or put elsewhere.
MESSAGES = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
    " }}{%- endfor -%}"
)
GENERATION = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + ('<think>\\n\\n</think>\\n' if"
    " m.role == 'assistant' else '') + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
)

FAULTY = {
    "no generation prompt": (MESSAGES, "before the answer, which would be supervised"),
    "assistant text left out": (
        "{%- for m in messages if m.role != 'assistant' -%}{{ '<|im_start|>' + m.content +"
        " '<|im_end|>' }}{%- endfor -%}" + GENERATION,
        "not a prefix",
    ),
    "assistant text left out, header kept": (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + (m.content if m.role !="
        " 'assistant' else '') + '<|im_end|>\\n' }}{%- endfor -%}" + GENERATION,
        "no supervised token",
    ),
    "ends after the header": (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + (m.content + '<|im_end|>\\n'"
        " if m.role != 'assistant' else '') }}{%- endfor -%}" + GENERATION,
        "no supervised token",
    ),
    "an empty think block in the answer": (THINKING + GENERATION, "<think> block"),
    "a think block in the generation prompt only": (
        MESSAGES
        + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n'"
        " }}{%- endif -%}",
        "not a prefix",
    ),
    "another generation prompt": (
        MESSAGES + "{%- if add_generation_prompt -%}{{ '<|im_start|>Assistant\\n' }}{%- endif -%}",
        "<|im_start|>' come 'Assistant",
    ),
    "words before the answer": (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + ('The label: ' if m.role =="
        " 'assistant' else '') + m.content + '<|im_end|>\\n' }}{%- endfor -%}" + GENERATION,
        "'The label: Other<|im_end|>\\n' before the answer",
    ),
    "generation prompt always": (
        MESSAGES + "{{ '<|im_start|>assistant\\n' }}",
        "puts its generation prompt",
    ),
    "prompt merges with the answer": (
        (
            "{%- for m in messages -%}{{ m.role + ': ' + m.content + ' ' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
        ),
        "not a prefix of all tokens",
    ),
    "refuses": ("{{ raise_exception('only\\nuser turns') }}", "refuses these turns (only)"),
    "does not parse": ("{% for %}", "refuses these turns"),
    "adds what cannot be added": ("{{ messages[0].content + 1 }}", "refuses these turns"),
}


def on(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with another template."""
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_template_is_named_not_trained_on(
    tiny: PreTrainedTokenizerBase, name: str
) -> None:
    template, fault = FAULTY[name]
    message = refusal(
        lambda: ChatTemplate(on(tiny, template), DATE, "models/faulty").encode(
            [([SYSTEM, USER], "Other")]
        )
    )
    assert message.startswith("models/faulty: the ") and fault in message


def test_an_empty_answer_is_no_supervised_token(tiny: PreTrainedTokenizerBase) -> None:
    assert "no supervised token" in refusal(
        lambda: ChatTemplate(tiny, DATE, "m").encode([([USER], " ")])
    )


def test_an_answer_that_merges_with_the_prompt_is_refused(qwen: PreTrainedTokenizerBase) -> None:
    message = refusal(
        lambda: ChatTemplate(qwen, DATE, "qwen").encode([([USER], "Other"), ([USER], "\nOther")])
    )
    assert message.startswith("qwen: the prompt's tokens are not a prefix of all tokens")


def test_a_fault_in_a_later_example_is_found_too(tiny: PreTrainedTokenizerBase) -> None:
    template = (
        MESSAGES.replace("m.content +", "('' if 'saw' in m.content else m.content) +") + GENERATION
    )
    many = [([USER], "Other")] * 3000 + [([USER], "he saw")]
    assert "no supervised token" in refusal(
        lambda: ChatTemplate(on(tiny, template), DATE, "m").encode(many)
    )


@pytest.mark.parametrize("none", [None, "", {"tool_use": MESSAGES}])
def test_a_tokenizer_without_chat_template_is_refused(
    tiny: PreTrainedTokenizerBase, none: object
) -> None:
    message = refusal(lambda: ChatTemplate(on(tiny, none), DATE, "models/base"))
    assert message.startswith(
        "models/base: the tokenizer has no chat template; add chat_template.jinja"
    )


def test_the_default_of_several_templates_is_taken(tiny: PreTrainedTokenizerBase) -> None:
    several = on(tiny, {"default": MESSAGES + GENERATION, "tool_use": "tools"})
    assert (
        ChatTemplate(several, DATE, "m")
        .render([USER], generation=True)
        .endswith("<|im_start|>assistant\n")
    )


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_a_folder_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert refusal(lambda: load_tokenizer(tmp_path)).startswith(f"{tmp_path}: ")


# ---- real tokenizers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "smollm2"])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["user", "system", "two shots"])
def test_tokens_are_those_of_transformers(
    name: str, conversation: list, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    chat = ChatTemplate(tokenizer, DATE, name)
    for label, encoded in zip(
        LABELS, chat.encode([(conversation, label) for label in LABELS]), strict=True
    ):
        answered = [*conversation, {"role": "assistant", "content": label}]
        assert encoded.tokens == tokenizer.apply_chat_template(answered, return_dict=False)
        assert encoded.tokens[: encoded.prompt_length] == tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.decode(encoded.tokens[encoded.prompt_length :]) == f"{label}<|im_end|>\n"
        answer = encoded.tokens[encoded.prompt_length :]
        assert tokenizer.decode(answer[: chat.end_of_turn(answer)]) == f"{label}<|im_end|>"


@pytest.mark.parametrize("name", ["qwen", "smollm2", "tiny"])
def test_answers_found_at_the_tail_equal_those_of_the_whole_text(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way of `encode` (the prompt once, the answer after the last added token) is exact
    on real sentences.
    """
    tokenizer = request.getfixturevalue(name)
    examples = load(Source(dataset="facts", split="train", limit=100))
    awkward = [
        "",
        " ",
        "\n\n",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "   x",
        "\u200b\u0301",
        "<|im_",
    ]
    pairs = [(turns(example, Prompt(), []), example.relation) for example in examples]
    pairs += [
        ([{"role": "user", "content": text}], answer)
        for text in awkward
        for answer in ("a", " a", "<|im_end|>b", "\u0301a")
    ]
    found = ChatTemplate(tokenizer, DATE, name).encode(pairs)
    monkeypatch.setattr(template_module, "TAIL", -1)
    assert ChatTemplate(tokenizer, DATE, name).encode(pairs) == found


@pytest.mark.parametrize(
    "prompt",
    [Prompt(), Prompt(enumerate=True, shots=2), Prompt(system=None, user="{text}")],
    ids=["0", "2", "bare"],
)
@pytest.mark.parametrize("name", ["qwen", "smollm2", "tiny"])
def test_what_all_prompts_begin_with_is_tokenised_once_and_exactly(
    name: str, prompt: Prompt, request: pytest.FixtureRequest
) -> None:
    chat = ChatTemplate(request.getfixturevalue(name), DATE, name)
    examples = load(Source(dataset="facts", split="train", limit=60))
    prompts = [
        chat.render(turns(example, prompt, LABELS, examples[: prompt.shots]), generation=True)
        for example in examples[2:]
    ]
    prompts += [
        chat.render([{"role": "user", "content": text}], generation=True)
        for text in ("", "\n", " <|im_start|>", "<|im_")
    ]
    for some in (prompts[:-4], prompts, prompts[:1], prompts[:1] * 3, []):
        assert chat.tokenize_prompts(some) == chat.tokenize(some)

    read, tokenize = [], chat.tokenize
    chat.tokenize = lambda texts: read.append(sum(map(len, texts))) or tokenize(texts)
    chat.tokenize_prompts(prompts[:-4])
    assert len(read) == 1
    if prompt.shots:
        assert read[0] < 0.5 * sum(map(len, prompts[:-4]))


def test_a_token_that_takes_the_space_before_it_is_not_cut_from_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    """An added token with `lstrip` eats the line end before it, which the shared start would keep:
    then nothing is shared.
    """
    shutil.copytree(tiny_model, tmp_path / "eating")
    path = tmp_path / "eating" / "tokenizer.json"
    tree = json.loads(path.read_text())
    for token in tree["added_tokens"]:
        token["lstrip"] = token["content"] == "<|im_start|>"
    path.write_text(json.dumps(tree))
    # from a folder transformers resets lstrip
    eating = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)))
    chat = ChatTemplate(on(eating, MESSAGES + GENERATION), DATE, "eating")
    prompts = [
        chat.render([SYSTEM, {"role": "user", "content": f"number {n}"}], generation=True)
        for n in range(5)
    ]
    assert chat.tokenize_prompts(prompts) == chat.tokenize(prompts)
    start = prompts[0][: prompts[0].index("<|im_start|>user")]
    # it does eat it
    # it does eat it
    assert chat.tokenize([start])[0] != chat.tokenize(prompts)[0][: len(chat.tokenize([start])[0])]


def test_many_conversations_keep_their_order(
    tiny: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatTemplate(tiny, DATE, "tiny")
    pairs = [([{"role": "user", "content": f"number {n}"}], f"label{n % 7}") for n in range(50)]
    whole = chat.encode(pairs)
    monkeypatch.setattr(template_module, "CHUNK", 8)
    assert chat.encode(pairs) == whole and list(chat.stream([])) == []
    texts = tiny.batch_decode([one.tokens for one in whole])
    assert all(
        f"number {n}<|im_end|>" in text and text.count(f"label{n % 7}<|im_end|>") == 1
        for n, text in enumerate(texts)
    )


def test_known_ids_of_the_model_page(
    qwen: PreTrainedTokenizerBase, smollm2: PreTrainedTokenizerBase
) -> None:
    """shared/models/README.md."""
    assert ChatTemplate(qwen, DATE, "qwen").tokenize(["Hello world"]) == [[9707, 1879]]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (found,) = ChatTemplate(smollm2, DATE, "smollm2").encode([(question, "Paris")])
    # fmt: off
    assert found.tokens[: found.prompt_length] == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28,
        7018, 411, 407, 19712, 8182, 2, 198,
        1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
    ]
    # fmt: on
    assert found.tokens[-2:] == [2, 198]


def test_truncation_in_tokenizer_json_cuts_nothing(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "cutting")
    path = tmp_path / "cutting" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tree["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path.write_text(json.dumps(tree))
    plain, cutting = (
        ChatTemplate(load_tokenizer(folder), DATE, "m")
        for folder in (tiny_model, tmp_path / "cutting")
    )
    assert cutting.digest == plain.digest
    assert cutting.encode([([SYSTEM, USER], "Other")]) == plain.encode([([SYSTEM, USER], "Other")])


# ---- SmolLM3: reasoning off, the date pinned ---------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["user", "system", "two shots"])
@pytest.mark.parametrize("name", ["qwen", "smollm2"])
def test_smollm3_is_trained_with_reasoning_off_and_the_date_pinned(
    name: str, conversation: list, smollm3_template: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = on(request.getfixturevalue(name), smollm3_template)
    chat = ChatTemplate(tokenizer, "2021-07-09", "smollm3")
    (found,) = chat.encode([(conversation, "born in")])
    prompt = tokenizer.decode(found.tokens[: found.prompt_length])
    assert tokenizer.decode(found.tokens[found.prompt_length :]) == "born in<|im_end|>\n"
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert "Today Date: 09 July 2021\n" in prompt and "Reasoning Mode: /no_think\n" in prompt
    # Each demonstration is answered as the model is asked to answer.
    shots = [turn["content"] for turn in conversation if turn["role"] == "assistant"]
    assert prompt.count("<think>\n\n</think>\n") == len(shots) + 1
    assert all(
        f"<|im_start|>assistant\n<think>\n\n</think>\n{shot}<|im_end|>\n" in prompt
        for shot in shots
    )
    theirs = tokenizer.apply_chat_template(
        [*conversation, {"role": "assistant", "content": "born in"}],
        enable_thinking=False,
        chat_template=chat.template,
        return_dict=False,
    )
    assert found.tokens == theirs


def test_todays_date_never_appears(qwen: PreTrainedTokenizerBase, smollm3_template: str) -> None:
    today = datetime.datetime.now()
    chat = ChatTemplate(on(qwen, smollm3_template), "2021-07-09", "smollm3")
    text = chat.render(CONVERSATIONS[2], generation=True)
    assert not any(today.strftime(form) in text for form in ("%d %B %Y", "%d %b %Y", "%Y-%m-%d"))
    assert "strftime_now" not in chat.template


LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string ="
    " strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%-"
    " endif %}{{- 'Today Date: ' + date_string + '\\n' }}"
)


def test_the_date_of_a_llama_template_is_pinned(qwen: PreTrainedTokenizerBase) -> None:
    chat = ChatTemplate(on(qwen, LLAMA + MESSAGES + GENERATION), "2021-07-09", "llama")
    assert chat.render([USER], generation=True).startswith("Today Date: 09 Jul 2021\n")


@pytest.mark.parametrize(
    "call", ["strftime_now('%Y')", 'strftime_now( "%Y" )', "strftime_now('%Y \"quoted\"')"]
)
def test_every_literal_form_of_the_date_is_pinned(qwen: PreTrainedTokenizerBase, call: str) -> None:
    chat = ChatTemplate(on(qwen, "{{ " + call + " }}"), "1999-12-31", "m")
    assert chat.render([USER], generation=True).startswith("1999")


def test_a_date_that_cannot_be_pinned_is_refused() -> None:
    message = refusal(
        lambda: pin_date(
            "{% set f = '%Y' %}{{ strftime_now(f) }}", datetime.date(2026, 1, 1), "models/dated"
        )
    )
    assert message.startswith(
        "models/dated: the chat template asks for the date in a way that cannot be pinned"
    )


def test_the_digest_follows_tokenizer_template_and_date(
    qwen: PreTrainedTokenizerBase, smollm2: PreTrainedTokenizerBase, smollm3_template: str
) -> None:
    def digest(tokenizer: PreTrainedTokenizerBase, template: str, date: str) -> str:
        return ChatTemplate(on(tokenizer, template), date, "m").digest

    digests = {
        digest(qwen, smollm3_template, DATE),
        digest(smollm2, smollm3_template, DATE),
        digest(qwen, smollm3_template, "2026-01-02"),
        digest(qwen, MESSAGES + GENERATION, DATE),
    }
    assert len(digests) == 4
    chat = ChatTemplate(on(qwen, smollm3_template), DATE, "elsewhere")
    chat.encode([([USER], "a")])
    assert chat.digest in digests


# Gemma's form: roles user and model, and a system turn that is refused (Gemma 2), left out, or put
# before the first user text (Gemma 3).
GEMMA_TURNS = (
    "{{ bos_token }}{%- for m in messages if m.role != 'system' -%}{{ '<|im_start|>' + ('model' if"
    " m.role == 'assistant' else m.role) + '\\n' + before[loop.index0] + m.content | trim +"
    " '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>model\\n'"
    " }}{%- endif -%}"
)
PLAIN = "{%- set before = [''] * messages | length -%}" + GEMMA_TURNS
NO_SYSTEM_TURN = {
    "refused": (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}"
        "{%- endif -%}" + PLAIN
    ),
    "left out": PLAIN,
}
MERGING = (
    "{%- set text = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}"
    "{%- set before = [text] + [''] * messages | length -%}" + GEMMA_TURNS
)


@pytest.mark.parametrize("name", NO_SYSTEM_TURN)
def test_the_system_text_goes_into_the_first_user_turn_where_there_is_no_other(
    tiny: PreTrainedTokenizerBase, name: str, capsys: pytest.CaptureFixture
) -> None:
    """The text and tokens are those of a template that merges by itself, and it is said once."""
    place = f"models/{name}"
    chat = ChatTemplate(on(tiny, NO_SYSTEM_TURN[name]), DATE, place)
    merging = ChatTemplate(on(tiny, MERGING), DATE, "models/merging")
    turns = [SYSTEM, *DEMONSTRATIONS, USER]
    text = chat.render(turns, generation=True)
    assert text == merging.render(turns, generation=True)
    assert text.count(SYSTEM["content"]) == 1
    assert f"{SYSTEM['content']}\n\n{DEMONSTRATIONS[0]['content']}" in text
    pairs = [([SYSTEM, USER], label) for label in LABELS]
    assert chat.encode(pairs) == merging.encode(pairs)
    again = ChatTemplate(on(tiny, NO_SYSTEM_TURN[name]), DATE, place)
    assert again.split([SYSTEM, USER], "no") == merging.split([SYSTEM, USER], "no")
    assert capsys.readouterr().err == (
        f"{place}: the chat template has no system turn; the system text goes before the first user"
        " turn\n"
    )
    assert not chat.has_system_turn and merging.has_system_turn


def test_turns_without_a_system_text_and_templates_with_a_system_turn_stay_as_they_are(
    tiny: PreTrainedTokenizerBase, qwen: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture
) -> None:
    chat = ChatTemplate(on(tiny, NO_SYSTEM_TURN["refused"]), DATE, "models/silent")
    assert chat.placed([*DEMONSTRATIONS, USER]) == [*DEMONSTRATIONS, USER]
    for tokenizer in (tiny, qwen):
        own = ChatTemplate(tokenizer, DATE, "models/own")
        assert own.has_system_turn and own.placed([SYSTEM, USER]) == [SYSTEM, USER]
    assert not capsys.readouterr().err


def test_a_template_that_loses_the_system_text_has_a_digest_of_its_own(
    tiny: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token cache of a version that left the text out is not read."""
    merged = ChatTemplate(on(tiny, PLAIN), DATE, "m").digest
    monkeypatch.setattr(ChatTemplate, "has_system_turn", True)
    assert ChatTemplate(on(tiny, PLAIN), DATE, "m").digest != merged
