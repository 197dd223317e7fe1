"""Amounts as people write them."""

import pytest

from expertly.errors import ExpertlyError
from expertly.plan.units import billions, bytes_of, count_of, gb, number


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24e9), ("24", 24e9), ("16GiB", 16 * 2**30), ("1.5 tb", 1.5e12), (".5kB", 500)],
)
def test_bytes(text, expected):
    assert bytes_of(text, "--memory") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("14.8T", 14.8e12), ("2.788M", 2.788e6), ("3e9", 3e9), ("100", 100), ("7b", 7e9)],
)
def test_counts(text, expected):
    assert count_of(text, "--train-tokens") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "0", "-3GB", "24XB", "many", "1e99", "nan", "inf", "1" * 400])
@pytest.mark.parametrize("read", [bytes_of, count_of])
def test_what_is_no_amount_is_one_line(read, text):
    with pytest.raises(ExpertlyError, match=r"E208.*--memory.*is no amount") as caught:
        read(text, "--memory")
    assert caught.value.exit_code == 2


def test_amounts_for_people():
    assert [number(each) for each in (0.1234, 12.345, 99.96, 100.4, 1234567)] == [
        "0.123",
        "12.3",
        "100",
        "100",
        "1,234,567",
    ]
    assert (gb(94.44e9), gb(1.128e12), gb(0.5e9)) == ("94.4 GB", "1,128 GB", "0.5 GB")
    assert billions(12_879_925_248) == "12.9 B"
