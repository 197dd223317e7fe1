"""Faults that were ordered happen, there and nowhere else; a misspelt order is an error."""

import errno
import math
import os
import signal

import pytest

from expertly import faults
from expertly.errors import ExpertlyError
from expertly.faults import VARIABLE, factor, injected, strike


def test_nothing_was_ordered(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    for point in faults.POINTS:
        strike(point, 1)
        assert (factor(point, 1), injected(point)) == (1.0, None)


def test_an_order_holds_at_its_place(monkeypatch):
    monkeypatch.setenv(VARIABLE, "train.loss@3:nan,train.loss@4:spike,log.board:error")
    assert math.isnan(factor("train.loss", 3))
    assert factor("train.loss", 4) == 10
    assert [factor("train.loss", where) for where in (1, 13, "", "03")] == [1.0] * 4
    assert [injected("log.board", where) for where in (1, 2, "")] == ["error"] * 3
    assert injected("log.metrics", 3) is None


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("full", OSError, os.strerror(errno.ENOSPC)),
        ("readonly", OSError, os.strerror(errno.EROFS)),
        ("memory", MemoryError, "tried to allocate 1073741824 bytes"),
        ("error", RuntimeError, "injected at save.begun"),
    ],
)
def test_errors(kind, error, said, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"save.begun@a:{kind}")
    strike("save.begun", "b")
    with pytest.raises(error, match=said):
        strike("save.begun", "a")


@pytest.mark.parametrize(("kind", "signum"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_signals_go_to_ourselves(kind, signum, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *to: sent.append(to))
    monkeypatch.setenv(VARIABLE, f"train.step@2:{kind}")
    strike("train.step", 1)
    assert sent == []
    strike("train.step", 2)
    assert sent == [(os.getpid(), signum)]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("save.written:kil", "no such kind 'kil'. FIX: write kill"),
        ("save.writen:kill", "no such point 'save.writen'. FIX: write save.written"),
        ("save.written", "no such kind ''. FIX: choose one of"),
        ("train.loss@2:nan,banana:kill", "no such point 'banana'. FIX: choose one of"),
    ],
)
def test_e209_an_unknown_order(order, said, monkeypatch):
    monkeypatch.setenv(VARIABLE, order)
    with pytest.raises(ExpertlyError) as caught:
        strike("train.step", 1)
    assert (caught.value.code, caught.value.exit_code) == ("E209", 2)
    assert said in str(caught.value)


def test_a_point_needs_its_line():
    with pytest.raises(AssertionError, match="POINTS"):
        strike("train.nowhere")
