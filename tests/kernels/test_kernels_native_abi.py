"""What the compiled kernels refuse, and what happens without them."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from expertly.kernels import native
from expertly.kernels import native_abi as abi
from expertly.kernels.native import Gate, library
from expertly.kernels.packed import empty_packed

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not compiled")
BEST = 0 if library() is None else library().isa


def weight_struct(weight):
    return abi.Weight.from_address(native.address_of(weight))


def broken(code, **fields):
    return pytest.param(fields, code, id="-".join(map(str, fields.items())) or "none")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        broken(-1, data=None),
        broken(-1, scales=None),
        broken(-4, bits=3),
        broken(-5, group=16),
        broken(-6, cols=80, group=64),
        broken(-7, zero_kind=3),
        broken(-7, zero_kind=1),
        broken(-8, rows=40),
        broken(-8, out=0),
        broken(-8, out=65),
        broken(-8, experts=0),
        broken(-8, cols=-32),
        broken(-9, rows=1 << 60),
        broken(-15, scales=1),
    ],
)
def test_a_broken_weight_is_refused(fields, code):
    weight = empty_packed((64, 128), 4, 32)
    struct = abi.Weight.from_buffer_copy(weight_struct(weight))
    for name, value in fields.items():
        setattr(struct, name, value)
    x, y = torch.zeros(1, 128), torch.zeros(1, 128)
    one = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
    call = library()._linears
    out = (ctypes.c_void_p * 1)(y.data_ptr())
    none = (ctypes.c_void_p * 1)(None)
    assert call(BEST, 1, 1, one, none, x.data_ptr(), 0, 1, out, 0) == code
    call = library()._grouped
    counts = torch.ones(1, dtype=torch.int64)
    arguments = (x.data_ptr(), 0, counts.data_ptr(), 1, y.data_ptr(), 0)
    assert call(BEST, 1, ctypes.addressof(struct), None, *arguments) == code


def test_broken_arguments_of_a_linear_are_refused():
    weight = empty_packed((16, 64), 8, 32)
    x, y = torch.zeros(2, 64), torch.zeros(2, 16)
    pointers = ctypes.c_void_p * 1
    good = [BEST, 1, 1, pointers(native.address_of(weight)), pointers(None), x.data_ptr(), 0, 2]
    good += [pointers(y.data_ptr()), 0]
    assert library()._linears(*good) == 0
    wrong = [(0, 3, -2), (0, -1, -2), (1, 0, -3), (1, 5000, -3), (2, 0, -8), (3, None, -1)]
    wrong += [
        (3, pointers(None), -1),
        (4, pointers(2), -15),
        (5, None, -1),
        (5, x.data_ptr() + 2, -15),
    ]
    wrong += [(6, 2, -10), (7, -1, -8), (7, 1 << 60, -9), (8, pointers(None), -1), (9, 7, -10)]
    for place, value, code in wrong:
        bad = [*good]
        bad[place] = value
        assert library()._linears(*bad) == code, (place, value)


@pytest.mark.parametrize("counts", [[1, 1], [2, -1], [-1, 3], [3, 0], [1 << 62, 1 << 62]])
def test_counts_that_do_not_fit_are_refused(counts):
    weight = empty_packed((2, 16, 64), 4, 32)
    rows = torch.zeros(3 if counts == [1, 1] else 1, 64)
    with pytest.raises(ValueError, match="counts are negative or do not add up"):
        library().grouped_linear(weight, None, rows, torch.tensor(counts))


def test_broken_arguments_of_experts_are_refused():
    gate_up, down = empty_packed((6, 192, 64), 4, 32), empty_packed((6, 64, 96), 4, 32)
    odd = empty_packed((6, 64, 64), 4, 32)
    few = empty_packed((5, 64, 96), 4, 32)
    x, ids, weights = torch.zeros(2, 64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    run = library().experts
    for layer in ((gate_up, odd), (gate_up, few), (odd, down)):
        with pytest.raises(ValueError, match="weights do not fit one another"):
            run(*layer, None, None, Gate("silu"), x, ids, weights)
    with pytest.raises(ValueError, match="gate is unknown"):
        run(gate_up, down, None, None, Gate("clamped", limit=-1.0), x, ids, weights)
    with pytest.raises(ValueError, match="a size is zero"):
        run(gate_up, down, None, None, Gate("silu"), x, ids[:, :0], weights[:, :0])
    for bad in ({"ids": ids.int()}, {"ids": ids[:1]}, {"weights": weights[:1]}, {"x": x[:, :63]}):
        with pytest.raises(ValueError, match=r"must be|weights for|packed weight"):
            arguments = {"x": x, "ids": ids, "weights": weights} | bad
            run(gate_up, down, None, None, Gate("silu"), **arguments)


def test_tensors_that_do_not_fit_are_refused_before_the_call():
    weight, x = empty_packed((16, 64), 4, 32), torch.zeros(2, 64)
    with pytest.raises(ValueError, match="packed weight"):
        library().linears([weight], [None], x[:, :32])
    with pytest.raises(ValueError, match="a bias must be"):
        library().linears([weight], [torch.zeros(15)], x)
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        library().linears([weight], [None], x.double())
    with pytest.raises(ValueError, match="its weight"):
        library().rms_norm(x, torch.zeros(63), 1e-6)
    with pytest.raises(ValueError, match="a size is zero"):
        library().rms_norm(x[:, :0], torch.zeros(0), 1e-6)


@pytest.mark.parametrize("shape", [(64,), (1, 2, 64)])
def test_rows_that_are_no_matrix_are_refused(shape):
    weight, x = empty_packed((1, 64, 64), 4, 32), torch.zeros(shape)
    counts, ids = torch.ones(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="x is"):
        library().grouped_linear(weight, None, x, counts)
    with pytest.raises(ValueError, match="x is"):
        gate = Gate("relu", False)
        library().experts(weight, weight, None, None, gate, x, ids, torch.ones(1, 1))


def test_tensors_of_another_device_are_refused():
    weight, stack = empty_packed((64, 64), 4, 32), empty_packed((1, 64, 64), 4, 32)
    x, counts = torch.zeros(1, 64), torch.ones(1, dtype=torch.int64)
    ids, weights, bias = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.zeros(64)
    given = stack, stack, None, None, Gate("relu", False)
    for call in (
        lambda: library().linears([weight], [None], x.to("meta")),
        lambda: library().linears([weight], [bias.to("meta")], x),
        lambda: library().grouped_linear(stack, None, x, counts.to("meta")),
        lambda: library().experts(*given, x, ids.to("meta"), weights),
        lambda: library().experts(*given, x, ids, weights.to("meta")),
        lambda: library().rms_norm(x, bias.to("meta"), 1e-6),
    ):
        with pytest.raises(ValueError, match="on the CPU"):
            call()


def test_no_memory_is_no_wrong_argument():
    with pytest.raises(MemoryError, match="experts: no memory"):
        abi.check("experts", -14)
    abi.check("experts", 0)


def headers():
    found = (Path(native.__file__).parent / "cpu").glob("*.h")
    return "".join(header.read_text() for header in found)


def test_a_library_of_other_sources_is_none(monkeypatch, tmp_path):
    built = Path(native.__file__).with_name("_cpu.so")
    assert abi.load(built) is not None
    monkeypatch.setattr(abi, "ABI", abi.ABI + 1)
    assert abi.load(built) is None
    lacks = type("Library", (), {})()  # expertly_abi, as those before it
    monkeypatch.setattr(abi, "_opened", lambda path: lacks)
    assert abi.load(built) is None


def test_header_and_python_have_the_same_number():
    assert re.findall(r"EXPERTLY_ABI = (\d+)", headers()) == [str(abi.ABI)]


def test_every_code_has_a_sentence():
    text = headers()
    codes = {int(code) for code in re.findall(r"EXPERTLY_\w+ = (-\d+)", text)}
    assert codes == abi.WRONG.keys()


def test_without_the_compiled_file_there_is_no_library(tmp_path):
    assert abi.load(tmp_path / "_cpu.so") is None
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    assert abi.load(tmp_path / "_cpu.so") is None
