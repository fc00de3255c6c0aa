"""Prompts: turns in order, templates that cannot surprise, demonstrations that never hold the
answer.
"""

import random
from collections import Counter

import pytest

from jaxre.config import Prompt
from jaxre.errors import InputError
from jaxre.relations.prompts import (
    TASK,
    by_label,
    choose_demonstrations,
    marked_text,
    parse_marked,
    turns,
    user_turn,
)
from jaxre.relations.schema import Example

LABELS = ("none", "born_in", "Died-In")


def example(name="1", text="Ada saw London.", **fields):
    return Example(
        **{
            "id": name,
            "dataset": "d",
            "split": "s",
            "text": text,
            "head": "Ada",
            "tail": "London",
            "relation": "none",
            **fields,
        }
    )


@pytest.fixture
def train():
    labels = ["a"] * 40 + ["b"] * 30 + ["c"] * 3 + ["none"] * 60
    return [
        example(f"t/{i}", f"Ada saw London {i}.", relation=label) for i, label in enumerate(labels)
    ]


def test_a_chat_is_system_demonstrations_and_the_question():
    shots = [
        example("2", "Ada left London.", relation="born_in"),
        example("3", "Ada is London.", relation="none"),
    ]
    chat = turns(example(), Prompt(system="Be brief.", user="{text} {head}>{tail}"), LABELS, shots)
    assert chat == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ada left London. Ada>London"},
        {"role": "assistant", "content": "born_in"},
        {"role": "user", "content": "Ada is London. Ada>London"},
        {"role": "assistant", "content": "none"},
        {"role": "user", "content": "Ada saw London. Ada>London"},
    ]


@pytest.mark.parametrize(
    ("system", "enumerate_", "content"),
    [
        (
            "S.",
            True,
            "S. The answer is exactly one label from this allowed set: Died-In, born_in, none",
        ),
        (
            None,
            True,
            "The answer is exactly one label from this allowed set: Died-In, born_in, none",
        ),
        ("S.", False, "S."),
        (None, False, None),
    ],
)
def test_the_label_list_is_sorted_and_independent_of_the_order_given(system, enumerate_, content):
    for labels in (LABELS, LABELS[::-1]):
        chat = turns(example(), Prompt(system=system, enumerate=enumerate_), labels)
        assert [turn["content"] for turn in chat if turn["role"] == "system"] == (
            [] if content is None else [content]
        )
        assert chat[-1]["role"] == "user"


def test_every_field_is_filled_and_an_unknown_type_reads_as_entity():
    prompt = Prompt(user="{text}|{marked}|{head}|{tail}|{head_type}|{tail_type}")
    assert (
        user_turn(example(tail_type="place"), prompt)
        == "Ada saw London.|<e1>Ada</e1> saw <e2>London</e2>.|Ada|London|entity|place"
    )


def test_the_default_prompt_ends_in_answer():
    assert (
        user_turn(example(), Prompt())
        == "Text: <e1>Ada</e1> saw <e2>London</e2>.\nHead: Ada\nTail: London\nAnswer:"
    )


@pytest.mark.parametrize(
    "text", ["{head} saw {tail} {0} {} {{x}}", "%s %(a)s $x", "{text.__class__}"]
)
def test_braces_in_the_data_are_data(text):
    tricky = example(text=text + " Ada London", head="{head}" if "{head}" in text else "Ada")
    assert (
        user_turn(tricky, Prompt(user="<{text}> {{literal}} {head}"))
        == f"<{tricky.text}> {{literal}} {tricky.head}"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{entity1}",
            r"prompt\.user: unknown field \{entity1\}; the fields are text, marked, head",
        ),
        ("{text.__class__}", r"prompt\.user: unknown field"),
        ("{text[0]}", r"prompt\.user: unknown field"),
        ("{}", r"prompt\.user: unknown field \{\}"),
        ("{0}", r"prompt\.user: unknown field \{0\}"),
        ("{text!r}", r"prompt\.user: unknown field \{text!r\}"),
        ("{text:>{head}}", r"prompt\.user: unknown field"),
        ("{text", r"prompt\.user: .*; write \{\{ and \}\} for a literal brace"),
        ("text}", r"prompt\.user: .*literal brace"),
    ],
)
def test_a_template_that_cannot_be_filled_names_its_key(template, message):
    with pytest.raises(InputError, match=message):
        user_turn(example(), Prompt(user=template))


@pytest.mark.parametrize(
    ("fields", "marked"),
    [
        (
            {"text": "London is Ada", "head_span": (10, 13), "tail_span": (0, 6)},
            "<e2>London</e2> is <e1>Ada</e1>",
        ),
        ({"text": "Ada Ada London", "head_span": (4, 7)}, "Ada <e1>Ada</e1> <e2>London</e2>"),
        ({"text": "Ada Ada London"}, "<e1>Ada</e1> Ada <e2>London</e2>"),
        ({"text": "war on war", "head": "war", "tail": "war"}, "<e1>war</e1> on <e2>war</e2>"),
        ({"text": "New York", "head": "New York", "tail": "York"}, "<e1>New <e2>York</e2></e1>"),
        ({"text": "She saw London"}, "She saw <e2>London</e2>"),
        ({"text": "Zoë 🙂 né", "head": "🙂", "tail": "né"}, "Zoë <e1>🙂</e1> <e2>né</e2>"),
    ],
)
def test_entities_are_marked_where_they_stand(fields, marked):
    assert marked_text(example(**fields)) == marked


def test_marked_text_of_the_command_line_becomes_an_example():
    parsed = parse_marked("<e2>London</e2> saw <e1>Ada</e1>")
    assert (parsed.text, parsed.head, parsed.tail, parsed.relation) == (
        "London saw Ada",
        "Ada",
        "London",
        "",
    )
    assert (parsed.head_span, parsed.tail_span) == ((11, 14), (0, 6))
    assert marked_text(parsed) == "<e2>London</e2> saw <e1>Ada</e1>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Ada saw London",
            "--text: no <e1> and no </e1> and no <e2> and no </e2>; mark the head as <e1>head</e1>",
        ),
        ("<e1>Ada</e1> saw London", "--text: no <e2> and no </e2>"),
        ("<e1>Ada</e1> <e1>saw</e1> <e2>London</e2>", "--text: <e1> occurs twice"),
        ("<e1>Ada saw <e2>London</e2>", "--text: no </e1>"),
        ("</e1>Ada<e1> saw <e2>London</e2>", "--text: </e1> stands before <e1>"),
        ("<e1></e1> saw <e2>London</e2>", "--text: nothing between <e1> and </e1>"),
        ("", "--text: no <e1>"),
        ("<e1>Ada\ud800</e1> saw <e2>London</e2>", "--text: is not UTF-8"),
    ],
)
def test_broken_marks_of_the_command_line_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_marked(text)


@pytest.mark.parametrize("mode", ["fixed", "per_example"])
@pytest.mark.parametrize("shots", [1, 2, 4, 7, 11])
def test_demonstrations_go_round_the_labels_and_repeat_no_text(train, mode, shots):
    chosen = choose_demonstrations(train, Prompt(shots=shots, demonstrations=mode), 42, example())
    counts = Counter(one.relation for one in chosen)
    assert len(chosen) == shots == len({one.text for one in chosen})
    assert all(
        counts[label] >= min(shots // 4, 3 if label == "c" else shots)
        for label in ("a", "b", "c", "none")
    )


@pytest.mark.parametrize("mode", ["fixed", "per_example"])
def test_the_choice_hangs_on_seed_and_ids_not_on_the_order(train, mode):
    prompt = Prompt(shots=5, demonstrations=mode)
    chosen = choose_demonstrations(train, prompt, 42, example())
    shuffled = random.Random(1).sample(train, len(train))
    assert choose_demonstrations(shuffled, prompt, 42, example()) == chosen
    assert choose_demonstrations(by_label(shuffled), prompt, 42, example()) == chosen
    assert choose_demonstrations(train, prompt, 43, example()) != chosen


def test_fixed_demonstrations_are_the_same_for_all_and_drawn_ones_differ(train):
    def choices(mode):
        return {
            tuple(
                choose_demonstrations(
                    train, Prompt(shots=3, demonstrations=mode), 42, example(str(i))
                )
            )
            for i in range(20)
        }

    assert choices("fixed") == {tuple(choose_demonstrations(train, Prompt(shots=3), 42))}
    assert len(choices("per_example")) > 15


@pytest.mark.parametrize("mode", ["fixed", "per_example"])
def test_no_example_sees_its_own_answer(train, mode):
    prompt = Prompt(shots=6, demonstrations=mode)
    for asked in train:
        chosen = choose_demonstrations(by_label(train), prompt, 42, asked)
        assert len(chosen) == 6
        assert asked.text not in {one.text for one in chosen}
    twin = example("other id", train[0].text)
    pool = [train[0], train[1]]
    assert choose_demonstrations(pool, Prompt(shots=1, demonstrations=mode), 42, twin) == [train[1]]
    spaced = example(
        "as another release writes it", train[0].text.replace(" ", "  ").replace(".", " .")
    )
    assert choose_demonstrations(pool, Prompt(shots=1, demonstrations=mode), 42, spaced) == [
        train[1]
    ]


def test_fixed_demonstrations_change_only_for_those_who_are_among_them(train):
    prompt = Prompt(shots=3)
    usual = choose_demonstrations(train, prompt, 42)
    changed = [one for one in train if choose_demonstrations(train, prompt, 42, one) != usual]
    assert sorted(one.id for one in changed) == sorted(one.id for one in usual)


def test_too_few_demonstrations_are_said():
    with pytest.raises(InputError, match=r"prompt\.shots=2: only 1 training example"):
        choose_demonstrations(
            [example("1"), example("2", "Ada left London.")], Prompt(shots=2), 42, example("9")
        )


def test_no_shots_need_no_training_examples():
    assert choose_demonstrations([], Prompt(), 42, example()) == []


def test_stratified_demonstrations_are_of_the_most_frequent_labels(train):
    """none 60, a 40, b 30, c 3: in this order, one each, then around again; the same for all
    examples.
    """
    for shots, labels in (
        (1, ["none"]),
        (2, ["none", "a"]),
        (6, ["none", "a", "b", "c", "none", "a"]),
    ):
        prompt = Prompt(shots=shots, demonstrations="stratified")
        chosen = choose_demonstrations(train, prompt, 42, example())
        assert [one.relation for one in chosen] == labels
        assert (
            choose_demonstrations(
                random.Random(1).sample(train, len(train)), prompt, 42, example("9", "Ada left.")
            )
            == chosen
        )
    even = [one for one in train if one.relation in "ab"][10:]  # 30 of a, 30 of b
    assert [
        one.relation
        for one in choose_demonstrations(even, Prompt(shots=2, demonstrations="stratified"), 1)
    ] == ["a", "b"]


def test_what_the_task_is_stands_between_the_system_turn_and_the_labels():
    chat = turns(example(), Prompt(system="S.", task_definition=True, enumerate=True), LABELS)
    assert (
        chat[0]["content"]
        == f"S. {TASK} The answer is exactly one label from this allowed set: Died-In, born_in,"
        " none"
    )
    assert turns(example(), Prompt(system=None, task_definition=True), LABELS)[0] == {
        "role": "system",
        "content": TASK,
    }
