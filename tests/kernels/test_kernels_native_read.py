"""Reading memory by all threads: every word once, and bounds that are checked."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.kernels import native_read
from expertly.kernels.native import library
from expertly.kernels.native_read import read_words

needs_library = pytest.mark.skipif(library() is None, reason="the kernels are not built")


@needs_library
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 400_000), st.integers(0, 2**32))
def test_every_word_is_read_once(count, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    assert read_words(words) == sum(words.tolist()) % 2**64


@needs_library
def test_what_is_no_whole_words_is_refused():
    data = torch.zeros(64, dtype=torch.uint8)
    for bad in (data[:9], data[1:9], data[::2]):
        with pytest.raises(ValueError, match="read: "):
            read_words(bad)


@needs_library
def test_the_native_side_checks_its_bounds():
    read, words, total = library().handle.expertly_read, torch.ones(4), ctypes.c_uint64()
    read_words(words)  # its types are known from here on
    to = ctypes.byref(total)
    for arguments, code in (
        ((1, None, 8, to), -1),
        ((1, words.data_ptr(), 8, None), -1),
        ((0, words.data_ptr(), 8, to), -3),
        ((5000, words.data_ptr(), 8, to), -3),
        ((1, words.data_ptr(), -8, to), -8),
        ((1, words.data_ptr(), 4, to), -8),
        ((1, words.data_ptr() + 4, 8, to), -15),
    ):
        assert read(*arguments) == code


def test_without_the_library_nothing_is_read(monkeypatch):
    monkeypatch.setattr(native_read, "library", lambda: None)
    assert read_words(torch.ones(2)) is None
