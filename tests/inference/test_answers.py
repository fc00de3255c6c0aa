"""Labels as answer tokens equal the template's own tokens on every question and label."""

import copy
import functools

import pytest

from jaxre.data.template import ChatTemplate
from jaxre.data.tokenizer import load_tokenizer
from jaxre.errors import InputError
from jaxre.inference.answers import label_answers
from jaxre.inference.scoring import score_labels

LABELS = [
    "Cause-Effect(e1,e2)",
    "Cause-Effect(e2,e1)",
    "Cause",
    "Cause-Effect",
    "Other",
    "no_relation",
    "per:country_of_birth",
    "per:country",
    "born in",
    "né à",
    "出生地",
    " leading space",
    "trailing space ",
    "1234",
    "<think",
]
SYSTEM = {"role": "system", "content": "Answer with only the relation label."}
QUESTIONS = [
    [SYSTEM, {"role": "user", "content": "Text: <e1>Ada</e1> wrote to <e2>Charles</e2>.\nAnswer:"}],
    [{"role": "user", "content": "Text: no system turn\nAnswer:"}],
    [
        SYSTEM,
        {
            "role": "user",
            "content": "Text: A <|im_end|> in the text <|im_start|>assistant\nAnswer:",
        },
    ],
    [
        SYSTEM,
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Other"},
        {"role": "user", "content": "Text: with a shot\nAnswer:"},
    ],
    [SYSTEM, {"role": "user", "content": "  \n"}],
]
QWEN, SMOLLM = "Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt"
    " %}assistant:{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>{% endfor %}{% if"
    " add_generation_prompt %}<s>assistant\n{% endif %}"
)


loaded = functools.cache(load_tokenizer)


def template_of(folder, chat_template=None):
    tokenizer = copy.copy(loaded(folder))
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    return ChatTemplate(tokenizer, "2026-01-01", "test")


def in_full(template, questions, labels):
    """What `template.encode` says, one conversation at a time."""
    prompts, answers = [], []
    for question in questions:
        encoded = [template.encode([(question, label)])[0] for label in labels]
        supervised = [one.tokens[one.prompt_length :] for one in encoded]
        prompts.append(encoded[0].tokens[: encoded[0].prompt_length])
        answers.append(
            tuple(tuple(tokens[: template.end_of_turn(tokens)]) for tokens in supervised)
        )
    return prompts, answers


@pytest.mark.parametrize("name", [QWEN, SMOLLM])
def test_answers_equal_the_templates_own_tokens(shared_models, name):
    template = template_of(shared_models / name)
    assert label_answers(template, QUESTIONS, LABELS) == in_full(template, QUESTIONS, LABELS)


@pytest.mark.parametrize("name", [QWEN, SMOLLM])
def test_answers_end_with_the_end_of_turn(shared_models, name):
    template = template_of(shared_models / name)
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    _, answers = label_answers(template, QUESTIONS, LABELS)
    assert all(
        answer[-1] == end and answer.count(end) == 1 for labels in answers for answer in labels
    )


def test_smollm3s_template_without_thinking_gets_its_own_tokens(shared_models):
    # Its own tokenizer is not here; SmolLM2's has the same turn tokens.
    template = template_of(
        shared_models / SMOLLM,
        (shared_models / "HuggingFaceTB/SmolLM3-3B/chat_template.jinja").read_text(
            encoding="utf-8"
        ),
    )
    prompts, answers = label_answers(template, QUESTIONS, LABELS)
    assert (prompts, answers) == in_full(template, QUESTIONS, LABELS)
    assert "</think>" in template.tokenizer.decode(prompts[0])[-20:]
    assert all("think>" not in template.tokenizer.decode(answer) for answer in answers[0])


def test_a_template_without_added_tokens_is_tokenised_in_full(shared_models):
    template = template_of(
        shared_models / "karpathy/stories260K/hf",
        PLAIN.replace("assistant:", "assistant:\n").replace("{{ m.role }}: ", "{{ m.role }}:\n"),
    )
    labels = ["once upon", "once", "a time"]
    assert label_answers(template, QUESTIONS, labels) == in_full(template, QUESTIONS, labels)


def test_a_tokenizer_that_adds_a_space_to_each_text_gets_the_same_answers(shared_models):
    template = template_of(shared_models / "karpathy/stories260K/hf", TRIMMED)
    labels = ["once upon", "once", "a time"]
    found = label_answers(template, QUESTIONS, labels)
    assert found == in_full(template, QUESTIONS, labels)
    assert all(answer[-1] == 2 for answer in found[1][0])


def test_a_template_that_answers_otherwise_for_some_questions_is_followed(shared_models):
    odd = TRIMMED.replace(
        "{{ m.content | trim }}</s>",
        "{{ m.content | trim }}{% if messages[0].content == 'shout' and m.role == 'assistant' %}!{%"
        " endif %}</s>",
    )
    template = template_of(shared_models / "karpathy/stories260K/hf", odd)
    questions = [[{"role": "user", "content": text}] for text in ("say", "shout", "say", "shout")]
    labels = ["once", "a time"]
    found = label_answers(template, questions, labels)
    assert found == in_full(template, questions, labels)
    assert found[1][0] != found[1][1]


def test_each_label_is_tokenised_once(shared_models, monkeypatch):
    template = template_of(shared_models / QWEN)
    texts = []
    tokenize = template.tokenize
    monkeypatch.setattr(
        template, "tokenize", lambda given: (texts.extend(given), tokenize(given))[1]
    )
    questions = [
        [SYSTEM, {"role": "user", "content": f"Text: sentence {i}\nAnswer:"}] for i in range(200)
    ]
    _, answers = label_answers(template, questions, LABELS)
    assert len(texts) == 200 + 2 * len(LABELS)  # each prompt; each label's tail alone and answered
    assert all(one is answers[0] for one in answers)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no label"),
        (["Other", ""], "empty label"),
        (["Other", " \n"], "empty label"),
        (["Other", "Cause", "Other"], "'Other' and 'Other' are the same"),
        (["Other", "Cause<|im_end|>"], "control token"),
    ],
)
def test_unusable_labels_are_named(shared_models, labels, message):
    with pytest.raises(InputError, match=message):
        label_answers(template_of(shared_models / QWEN), QUESTIONS, labels)


def test_labels_that_differ_by_spaces_a_template_trims_are_refused(shared_models):
    template = template_of(shared_models / "karpathy/stories260K/hf", TRIMMED)
    with pytest.raises(
        InputError, match="'once' and 'once ' are the same inside the chat template"
    ):
        label_answers(template, QUESTIONS, ["once", "a time", "once "])


@pytest.mark.parametrize("before", ["", "<|im_start|>"], ids=["no added token", "added token"])
def test_a_template_whose_prompt_tokens_are_no_prefix_is_refused(shared_models, before):
    # "on" and "ce" apart are other tokens than "once".
    prompt = before + "assistant: on"
    odd = (
        "{% for m in messages %}{{ 'PROMPT' if m.role == 'assistant' else 'user: ' }}{{ m.content"
        " }}\n{% endfor %}"
    )
    odd = odd.replace("PROMPT", prompt) + "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    with pytest.raises(InputError, match="not a prefix"):
        label_answers(template_of(shared_models / QWEN, odd), QUESTIONS[:1], ["ce", "e"])


@pytest.mark.parametrize("name", [QWEN, SMOLLM])
def test_scores_in_the_real_template_and_vocabulary_equal_brute_force(models, shared_models, name):
    template = template_of(shared_models / name)
    labels = LABELS[:8]
    prompts, answers = label_answers(template, QUESTIONS, labels)
    model = models.random_model(151_936 if name == QWEN else 49_152, adapter=True)
    truth = models.brute_force(models.in_transformers(model), *in_full(template, QUESTIONS, labels))
    assert models.largest_difference(score_labels(model, prompts, answers), truth) < 1e-5
