"""Conversations: the assistant's turns count, whatever the chat template looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.errors import DataError
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data import chat
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.examples import IGNORED, Examples
from fedqsn_cli.training.data.tables import Table
from support.tokenizers import KINDS, tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }} says: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant says: {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant says: {% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.role }} says: {{ m.content }}\n{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}...{% endif %}{% endfor %}"
ELSEWHERE = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is a fox."},
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "hello there!"},
]


def encoder(kind: str, template: str, **options: Any) -> Encoder:
    made = tokenizer(kind)
    made.chat_template = template
    fields = {"label_ids": {}, "labels": 0, "max_length": 256, "positions": 1024, "vocabulary": 10**6, **options}
    return Encoder(task="causal-lm", tokenizer=made, inputs=frozenset({"input_ids"}), **fields)


def encode(given: Encoder, *conversations: Any) -> Examples:
    table = Table(Path("data.jsonl"), {"messages": list(conversations)}, ("messages",), len(conversations))
    return given.encode(table, Silent())


def tokens_and_targets(given: Encoder, turns: Any) -> list[tuple[dict[str, Any], list[int]]]:
    table = Table(Path("data.jsonl"), {"messages": [turns]}, ("messages",), 1)
    return chat.conversations(given, table, Silent())[0]


def of_columns(given: Encoder, **columns: Any) -> Examples:
    return given.encode(
        Table(Path("data.jsonl"), {name: [value] for name, value in columns.items()}, (*columns,), 1), Silent()
    )


SHARED = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "What is it?"},
    {"from": "gpt", "value": "It is a fox."},
    {"from": "human", "value": "hello world"},
    {"from": "gpt", "value": "hello there!", "weight": None},
]
IN_PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"][:3]}, turn["content"][3:]]} for turn in TURNS]
LISTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}",
)
TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function.name }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CALL = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}]


@pytest.mark.parametrize("template", [CHATML, MARKED, LISTS])
def test_the_form_of_turns_does_not_change_what_is_learnt(template: str) -> None:
    given = encoder("byte-level", template)
    expected = encode(given, TURNS)
    assert of_columns(given, conversations=SHARED) == expected
    assert of_columns(given, conversations=TURNS) == expected
    assert of_columns(given, messages=SHARED) == expected
    assert of_columns(given, messages=IN_PARTS) == expected


def test_calls_of_tools_and_the_tools_themselves_are_told_to_the_template() -> None:
    given = encoder("byte-level", TOOLS)
    examples = of_columns(given, messages=CALL, tools='[{"name": "look"}]')
    assert given.tokenizer.decode(examples.features[0]["input_ids"]).startswith('tools: [{"name": "look"}]\nuser: hi')
    assert counted(given, examples) == ["call look"]
    assert of_columns(given, messages=CALL, tools=None) == of_columns(given, messages=CALL)
    assert examples.unused == ()


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], "is not a list of objects with a role and a content"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "has a part in turn 1 that is not text"),
        ([{"role": "user"}], "is not a list of objects with a role and a content"),
        ([{"from": "human"}], "is not a list of objects with a role and a content"),
        ([{"from": None, "value": "hi"}], "is not a list of objects with a role and a content"),
        (["hi"], "is not a list of objects with a role and a content"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_row(turns: list[Any], complaint: str) -> None:
    with pytest.raises(DataError, match=f"row 1: column 'conversations' {complaint}"):
        of_columns(encoder("byte-level", CHATML), conversations=turns)


def counted(given: Encoder, examples: Examples) -> list[str]:
    """The texts that count, one for each run of tokens."""
    runs: list[list[int]] = []
    before = IGNORED
    for target in examples.targets[0]:
        if target != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(target)
        before = target
    return [given.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word-piece"])
def test_turns_of_the_assistant_are_found_by_rendering_prefixes(kind: str) -> None:
    given = encoder(kind, CHATML)
    examples = encode(given, TURNS)
    text = given.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert examples.features[0]["input_ids"] == given.tokenizer(text, add_special_tokens=False)["input_ids"]
    first, second = counted(given, examples)
    assert (first.strip(), second.strip()) == ("It is a fox.<|im_end|>", "hello there!<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, "{{ '<s>' }}" + CHATML, PLAIN])
def test_the_assistant_may_begin(template: str) -> None:
    given = encoder("byte-level", template)
    assert counted(given, encode(given, TURNS[2:])) == counted(given, encode(given, TURNS))


def test_who_begins_must_be_seen_in_the_template() -> None:
    with pytest.raises(DataError, match="row 1: column 'messages': the assistant begins, and the chat template has no"):
        given = encoder("byte-level", PLAIN.split("{% if")[0])
        encode(given, TURNS[2:])


def test_half_a_character_in_a_turn_is_named() -> None:
    with pytest.raises(DataError, match="row 1: column 'messages' holds U.D800 at 1, which is not a character"):
        encode(encoder("byte-level", CHATML), [{"role": "user", "content": "a\ud800"}, TURNS[2]])


def test_a_template_without_a_generation_prompt_works_too() -> None:
    given = encoder("byte-level", LLAMA2)
    assert counted(given, encode(given, TURNS[1:])) == [" It is a fox.</s>", " hello there!</s>"]


def test_the_line_break_that_ends_a_turn_counts_where_no_special_token_does() -> None:
    given = encoder("byte-level", PLAIN)
    assert counted(given, encode(given, TURNS)) == [" It is a fox.\n", " hello there!\n"]  # tokens hold the space


def test_marks_of_a_template_are_believed() -> None:
    given = encoder("byte-level", MARKED)
    assert [text.strip() for text in counted(given, encode(given, TURNS))] == ["It is a fox.", "hello there!"]


def test_a_conversation_in_which_the_assistant_says_nothing_is_skipped() -> None:
    given = encoder("byte-level", CHATML)
    examples = encode(given, TURNS[:2], TURNS)
    assert (len(examples), examples.skipped) == (1, 1)


def test_conversations_may_be_the_text_of_json() -> None:
    import json

    given = encoder("byte-level", CHATML)
    assert encode(given, json.dumps(TURNS)) == encode(given, TURNS)


def test_a_long_conversation_is_cut_and_counted() -> None:
    given = encoder("byte-level", CHATML, max_length=30)
    examples = encode(given, TURNS, TURNS[1:3])
    assert examples.cut == 1
    assert max(examples.lengths) == 30


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [1, 17, 30, 200])
def test_what_is_left_of_a_long_conversation_is_learnt_as_without_a_cut(side: str, length: int) -> None:
    whole, shorter = encoder("byte-level", CHATML), encoder("byte-level", CHATML, max_length=length)
    shorter.tokenizer.truncation_side = side
    nothing_said = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    kept = slice(-length, None) if side == "left" else slice(length)
    for turns in (TURNS * 2, TURNS[1:] + nothing_said, nothing_said + TURNS):
        ((expected, targets),) = tokens_and_targets(whole, turns)
        ((found, learnt),) = tokens_and_targets(shorter, turns)
        assert (found["input_ids"], learnt) == (expected["input_ids"][kept], targets[kept])


@pytest.mark.parametrize("side", ["left", "right"])
def test_turns_that_are_cut_are_not_looked_for(side: str) -> None:
    given = encoder("byte-level", CHATML, max_length=100)
    given.tokenizer.truncation_side = side
    rendered: list[int] = []
    apply = given.tokenizer.apply_chat_template
    given.tokenizer.apply_chat_template = lambda turns, **options: rendered.append(1) or apply(turns, **options)
    tokens_and_targets(given, TURNS[1:] * 500)
    assert 3 < len(rendered) < 30


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (FORGETFUL, "renders turn 3 otherwise than behind its own generation prompt"),
        (ELSEWHERE, "renders turn 3 otherwise than behind its own generation prompt"),
        (
            CHATML.replace(
                "{{ m.content }}", "{{ m.content[:2] if m.role == 'assistant' and not loop.last else m.content }}"
            ),
            "renders turn 3 otherwise once other turns follow",
        ),
        ("{{ raise_exception('roles must alternate') }}", "does not accept the conversation .roles must alternate"),
        ("{% for m in messages %}{{ m.x.y }}{% endfor %}", "does not accept the conversation"),
    ],
)
def test_a_template_that_does_not_tell_what_to_learn_is_refused(template: str, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl: row 1: column 'messages': .*{complaint}") as caught:
        encode(encoder("byte-level", template), TURNS)
    assert "\n" not in str(caught.value)
