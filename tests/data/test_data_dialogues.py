"""What a row says: every format, and one line for every row that says nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.data.dialogues import Completion, Dialogue, said_in

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "hello"}
FORMATS = {
    "messages": ({"messages": [ASKED, ANSWERED]}, Dialogue([ASKED, ANSWERED])),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        Dialogue([ASKED, ANSWERED]),
    ),
    "roles in conversations": ({"conversations": [ASKED, ANSWERED]}, Dialogue([ASKED, ANSWERED])),
    "completion": ({"prompt": "hi", "completion": " you"}, Completion("hi", " you")),
    "messages as a completion": (
        {"prompt": [ASKED], "completion": [ANSWERED]},
        Dialogue([ASKED, ANSWERED], first=1),
    ),
    "text": ({"text": "hi"}, "hi"),
    "null columns": ({"messages": None, "text": "hi"}, "hi"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWERED]},
        Dialogue([ASKED, ANSWERED]),
    ),
    "thoughts": (
        {"messages": [ASKED, {**ANSWERED, "reasoning_content": "greet", "tool_calls": None}]},
        Dialogue([ASKED, {**ANSWERED, "reasoning_content": "greet"}]),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_told_by_its_columns(form):
    row, said = FORMATS[form]
    assert said_in({**row, "other": 3}) == said


BAD = {
    "none of the columns": ({"body": "x"}, "none of the columns .*, but body"),
    "no columns": ({}, "but none"),
    "a prompt alone": ({"prompt": "x"}, "none of the columns"),
    "no list": ({"messages": "hi"}, "messages holds str, not a list"),
    "no turns": ({"messages": []}, "messages is empty"),
    "no message": ({"messages": ["hi"]}, r"messages\[0\] is no message"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] is no message"),
    "a bad role": ({"messages": [{"role": "cat", "content": ""}]}, "the role 'cat', not one of"),
    "a list as role": ({"conversations": [{"from": [1], "value": ""}]}, r"the role \[1\]"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\] holds int"),
    "null": ({"conversations": [{"from": "gpt", "value": None}]}, r"\[0\] holds nothing"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages\[0\] holds list, not a text",
    ),
    "a tool": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "calls a tool",
    ),
    "half a character": ({"text": "a\ud800"}, "lone surrogate at character 1"),
    "blank text": ({"text": " \n"}, "text is empty"),
    "blank completion": ({"prompt": "hi", "completion": ""}, "completion is empty"),
    "both kinds": ({"prompt": "hi", "completion": [ANSWERED]}, "prompt holds str, not a list"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_refused_with_its_reason(fault):
    row, why = BAD[fault]
    with pytest.raises(ValueError, match=why):
        said_in(row)


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
KEYS = st.sampled_from(["role", "content", "from", "value"])
TURNS = st.dictionaries(KEYS, LEAVES | st.just("user") | st.lists(LEAVES, max_size=2), max_size=4)
VALUES = LEAVES | st.lists(TURNS | LEAVES, max_size=3)
COLUMNS = st.sampled_from(["messages", "conversations", "prompt", "completion", "text"])


@settings(max_examples=50)
@given(st.dictionaries(COLUMNS, VALUES, max_size=3))
def test_any_row_is_understood_or_refused(row):
    try:
        said = said_in(row)
    except ValueError:
        return
    assert isinstance(said, Dialogue | Completion | str)
