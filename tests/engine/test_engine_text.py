"""Text as it comes: all of it, in order, and no half characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.engine.text import pieces


def by_byte(ids):
    """A tokenizer whose tokens are bytes; 256 is special and shows nothing."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def by_word(ids):
    """A tokenizer that writes a space between words, not before the first."""
    return " ".join(f"w{i}" for i in ids)


@given(st.lists(st.characters(codec="utf-8") | st.none()))
def test_pieces_make_the_whole_text(characters):
    coded = [[256] if each is None else each.encode() for each in characters]
    made = list(pieces(by_byte, [token for each in coded for token in each]))
    assert "".join(made) == "".join(each for each in characters if each is not None)
    assert all(made[:-1])


@given(st.lists(st.integers(0, 9)))
def test_spaces_between_words_stay(ids):
    assert "".join(pieces(by_word, ids)) == by_word(ids)


def test_a_character_of_several_tokens_comes_with_its_last():
    ids = list("aé€😀b".encode())
    assert list(pieces(by_byte, ids)) == ["a", "é", "€", "😀", "b"]


@given(st.lists(st.integers(0, 255), max_size=60))
def test_broken_bytes_never_hold_the_text_back_for_good(ids):
    made = list(pieces(by_byte, [*ids, *b"the end"]))
    assert "".join(made).endswith("the end")
    assert "".join(pieces(by_byte, ids)).count("\N{REPLACEMENT CHARACTER}") <= len(ids)


def test_what_is_unfinished_at_the_end_is_shown_as_such():
    assert "".join(pieces(by_byte, "€".encode()[:2])) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("ids", [[], [256], [256, 256]])
def test_nothing_to_say(ids):
    assert "".join(pieces(by_byte, ids)) == ""
