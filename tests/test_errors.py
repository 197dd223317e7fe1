"""The error contract: the one line, the exit codes, the nearest name."""

import pytest

from expertly.errors import CODES, ExpertlyError, nearest


def test_the_line_says_what_why_and_the_fix():
    error = ExpertlyError("E301", "a.safetensors", "412 of 980 bytes", fix="copy it again")
    assert str(error) == "error[E301] a.safetensors: 412 of 980 bytes. FIX: copy it again"
    assert (error.code, error.what, error.fix) == ("E301", "a.safetensors", "copy it again")
    assert error.why == "412 of 980 bytes"


@pytest.mark.parametrize(
    ("code", "status"),
    [("E101", 1), ("E201", 2), ("E301", 3), ("E401", 4), ("E501", 5), ("E999", 6)],
)
def test_the_first_digit_settles_the_exit_code(code, status):
    assert ExpertlyError(code, "a", "b", fix="c").exit_code == status


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_an_exit_code_and_a_meaning(code):
    assert ExpertlyError(code, "a", "b", fix="c").exit_code in range(1, 7)
    assert CODES[code]


def test_a_code_that_is_not_in_the_table_is_a_bug():
    with pytest.raises(AssertionError, match="E998"):
        ExpertlyError("E998", "a", "b", fix="c")


def test_nearest_names_the_close_one_or_all():
    known = ["learning_rate", "warmup_steps"]
    assert nearest("learnin_rate", known) == "write learning_rate"
    assert nearest("zzz", known) == "choose one of learning_rate, warmup_steps"
    assert nearest("zzz", (name for name in reversed(known))) == nearest("zzz", known)
