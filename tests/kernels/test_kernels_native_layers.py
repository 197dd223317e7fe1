"""Layers in one native call, against the single calls that they are made of, to the bit."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest
import torch

from expertly.kernels.native import ISAS, Gate, Library, library
from expertly.kernels.native_layers import ExpertsPart, LayerParts, NativeLayers, NormPart
from expertly.kernels.native_ops import AttentionForm, New, Operations, Room, RouterForm
from expertly.kernels.quantize import quantize

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")
BEST = 0 if library() is None else library().isa
DTYPES = (torch.float32, torch.bfloat16)
DIM, HEADS, KV, HEAD, HIDDEN, EXPERTS, ROOM = 64, 4, 2, 32, 32, 5, 12
LENGTH = 7  # tokens that are in the cache


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def kernels(request):
    if request.param > BEST:
        pytest.skip("this machine lacks the instruction set")
    return Library(library().handle, request.param)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Kind(NamedTuple):
    """What a layer has and how its numbers are kept."""

    bits: int = 4
    bias: bool = False
    norm: str = "none"  # of queries and keys
    router: RouterForm | None = RouterForm(2)
    chosen_by_bias: bool = False
    once: bool = False


SIGMOID = RouterForm(3, "sigmoid", renormalize=True, scale=1.5)
KINDS = {
    "4 bits": Kind(),
    "8 bits, biases": Kind(8, bias=True, norm="each head"),
    "16 bits": Kind(16, norm="all heads", once=True),
    "selection bias": Kind(norm="each rotated head", router=SIGMOID, chosen_by_bias=True),
    "no experts": Kind(bias=True, router=None),
}


class Random:
    """Normal numbers, the same ones for the same seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype)

    def packed(self, bits, *shape):
        return quantize(self(*shape, scale=0.1), bits, 0 if bits == 16 else 32)


@cache
def layer(kind, dtype, seed=0):
    draw = Random(seed)
    outs = (HEADS * HEAD, KV * HEAD, KV * HEAD, DIM)
    widths = (DIM, DIM, DIM, HEADS * HEAD)
    wide = {"none": None, "all heads": (HEADS, KV)}.get(kind.norm, (1, 1))
    norms = tuple(NormPart(draw(DIM, dtype=dtype), 1e-5, 0.0, kind.once) for _ in range(2))
    return LayerParts(
        norms,
        tuple(draw.packed(kind.bits, o, w) for o, w in zip(outs, widths, strict=True)),
        tuple(draw(out) if kind.bias else None for out in outs),
        AttentionForm(HEADS, KV, HEAD, 0.2, norm=kind.norm, eps=1e-5),
        *(None if wide is None else draw(w * HEAD, dtype=dtype) for w in wide or (0, 0)),
        None if kind.router is None else experts(kind, dtype, draw),
    )


def experts(kind, dtype, draw):
    form = kind.router._replace(weights_dtype=dtype, exact=dtype == torch.float32)
    return ExpertsPart(
        form,
        draw(EXPERTS, DIM, dtype=dtype),
        draw(EXPERTS) if kind.chosen_by_bias else None,
        draw.packed(kind.bits, EXPERTS, 2 * HIDDEN, DIM),
        draw.packed(kind.bits, EXPERTS, DIM, HIDDEN),
        draw(EXPERTS, 2 * HIDDEN) if kind.bias else None,
        draw(EXPERTS, DIM) if kind.bias else None,
        Gate("clamped") if kind.bias else Gate("silu"),
    )


def inputs(batch, dtype, layers=1, seed=9, size=ROOM):
    """x, angles and rooms."""
    draw = Random(seed)
    angles = draw(1 if seed % 2 else batch, 1, HEAD)
    rooms = [Room(*(draw(batch, KV, size, HEAD, dtype=dtype) for _ in "kv")) for _ in range(layers)]
    return draw(batch, 1, DIM, dtype=dtype), (angles.cos().to(dtype), angles.sin().to(dtype)), rooms


def single_calls(kernels, parts, x, angles, room, length):
    """A layer's answer and its second norm's, one call after the other."""
    native = Operations(kernels.handle, kernels.isa)

    def norm(part, x):
        return kernels.rms_norm(x, part.weight, part.eps, part.offset, once=part.once)

    three = kernels.linears(parts.projections[:3], parts.biases[:3], norm(parts.norms[0], x))
    new = New(*three, *angles)
    heads = native.attend(parts.form, new, room, length, parts.q_norm, parts.k_norm)
    [out] = kernels.linears(parts.projections[3:], parts.biases[3:], heads.view(len(x), 1, -1))
    x = x + out
    normed = norm(parts.norms[1], x)
    if parts.experts is None:
        return x, normed
    part, flat = parts.experts, normed.flatten(0, 1)
    _, weights, ids = native.route(part.form, flat, part.weight, part.bias)
    return x + kernels.experts(*part[3:], flat, ids, weights).view_as(x), normed


def check(kernels, parts, batch, dtype, length=LENGTH, **changes):
    x, angles, rooms = inputs(batch, dtype, len(parts), **changes)
    copies = [Room(room.keys.clone(), room.values.clone()) for room in rooms]
    given = x.clone()
    got, got_normed = NativeLayers(kernels, parts).decode(x, angles, rooms, length)
    want = x
    for part, room in zip(parts, copies, strict=True):
        want, normed = single_calls(kernels, part, want, angles, room, length)
    assert got.isfinite().all()
    assert got.equal(want)
    assert got_normed.equal(normed)
    assert x.equal(given)
    for mine, own in zip(rooms, copies, strict=True):
        assert mine.keys.equal(own.keys)
        assert mine.values.equal(own.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_layer_is_its_single_calls(kernels, kind, batch, count, dtype):
    with threads(count):
        check(kernels, [layer(kind, dtype)], batch, dtype)
        check(kernels, [layer(kind, dtype)], batch, dtype, seed=8)  # each sequence elsewhere


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("last", ["4 bits", "no experts"])
def test_layers_are_one_another_s_input(kernels, last, count, dtype):
    kinds = [*[kind for kind in KINDS.values() if kind.router], KINDS[last]]
    stack = [layer(kind, dtype, seed) for seed, kind in enumerate(kinds)]
    with threads(count):
        check(kernels, stack, 2, dtype)
        check(kernels, stack[-3:], 1, dtype)
        check(kernels, stack[:2], 3, dtype, 700, size=720)  # threads share attention, too


def test_norms_in_float32_of_bfloat16_numbers(kernels):
    parts = layer(Kind(), torch.bfloat16)
    norms = tuple(
        part._replace(weight=part.weight.float(), offset=1.0, once=True) for part in parts.norms
    )
    check(kernels, [parts._replace(norms=norms)], 2, torch.bfloat16)


def test_python_threads_have_teams_of_their_own():
    stack = [layer(kind, torch.float32, i) for i, kind in enumerate([Kind(), Kind(8)])]
    native = NativeLayers(library(), stack)

    def decode(seed):
        x, angles, rooms = inputs(2, torch.float32, 2, seed=seed)
        with threads(2):
            for step in range(ROOM - LENGTH):
                x, _ = native.decode(x, angles, rooms, LENGTH + step)
        return x, rooms[-1].keys

    want = [decode(seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        got = [*pool.map(decode, range(24))]
    for mine, own in zip(got, want, strict=True):
        assert all(a.equal(b) for a, b in zip(mine, own, strict=True))


def decode(parts, x, angles, rooms, length=LENGTH):
    return NativeLayers(library(), parts).decode(x, angles, rooms, length)


X, ANGLES, ROOMS = inputs(2, torch.float32)
WRONG_INPUTS = {
    "wide": (X.repeat(1, 1, 2), ANGLES, ROOMS),
    "flat": (X.flatten(1), ANGLES, ROOMS),
    "two tokens": (X.repeat(1, 2, 1), ANGLES, ROOMS),
    "dtype": (X.bfloat16(), ANGLES, ROOMS),
    "every dtype": (X.double(), tuple(each.double() for each in ANGLES), ROOMS),
    "strides": (X.repeat(1, 1, 2)[..., ::2], ANGLES, ROOMS),
    "angles' dtype": (X, (ANGLES[0].bfloat16(), ANGLES[1]), ROOMS),
    "angles' shapes": (X, (ANGLES[0][..., :-2], ANGLES[1]), ROOMS),
    "angles of two tokens": (X, tuple(each.repeat(1, 2, 1) for each in ANGLES), ROOMS),
    "angles of three sequences": (X, tuple(each.repeat(3, 1, 1) for each in ANGLES), ROOMS),
    "odd angles": (X, tuple(each[..., :31].contiguous() for each in ANGLES), ROOMS),
    "sequences": (X[:1], ANGLES, ROOMS),
    "no sequences": (X[:0], ANGLES, inputs(0, torch.float32)[2]),
    "no rooms": (X, ANGLES, []),
    "two rooms": (X, ANGLES, ROOMS * 2),
    "a cache's dtype": (X, ANGLES, inputs(2, torch.bfloat16)[2]),
    "a cache's heads": (X, ANGLES, [Room(torch.zeros(2, 1, 9, HEAD), torch.zeros(2, 1, 9, HEAD))]),
    "a cache's width": (X, ANGLES, [Room(torch.zeros(2, KV, 9, 64), torch.zeros(2, KV, 9, 64))]),
}


@pytest.mark.parametrize("given", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_inputs_that_do_not_fit_are_refused(given):
    before = ROOMS[0].keys.clone()
    with pytest.raises(ValueError, match=r"layers|argument"):
        decode([layer(Kind(), torch.float32)], *given)
    assert ROOMS[0].keys.equal(before)


@pytest.mark.parametrize("length", [-1, ROOM, 1 << 62])
def test_no_room_is_refused_before_anything_is_written(length):
    before = ROOMS[0].keys.clone()
    with pytest.raises(ValueError, match="no room"):
        decode([layer(Kind(), torch.float32)], X, ANGLES, ROOMS, length)
    assert ROOMS[0].keys.equal(before)


def changed(part=None, **fields):
    biased = any("bias" in name for name in fields)
    parts = layer(Kind(bias=biased, norm="each head"), torch.float32)
    if part == "experts":
        fields = {"experts": parts.experts._replace(**fields)}
    if "first" in fields:
        fields = {"projections": (fields["first"], *parts.projections[1:])}
    if "bias" in fields:
        fields = {"biases": (fields["bias"], *parts.biases[1:])}
    return parts._replace(**fields)


DRAW = Random(3)
NORM = NormPart(torch.ones(DIM), 1e-5, 0.0, False)
# what a layer's parts are changed to, and the sentence about it
WRONG_PARTS = {
    "x is": [{"first": DRAW.packed(4, HEADS * HEAD, 96)}],
    "fit one another": [
        {"first": DRAW.packed(4, HEADS * HEAD - 16, DIM)},
        {"form": AttentionForm(3, KV, HEAD, 0.2)},
        {"norms": (NORM, NORM._replace(weight=torch.ones(DIM + 32)))},
        {"part": "experts", "gate_up": DRAW.packed(4, EXPERTS, 2 * HIDDEN, 96)},
        {"part": "experts", "down": DRAW.packed(4, EXPERTS, DIM + 16, HIDDEN)},
        {"part": "experts", "down": DRAW.packed(4, EXPERTS, DIM, 64)},
        {"part": "experts", "weight": torch.ones(EXPERTS, DIM + 1)},
    ],
    "does not fit them": [{"form": AttentionForm(HEADS, 1, HEAD, 0.2)}],
    "than there are": [{"part": "experts", "form": RouterForm(EXPERTS + 1)}],
    "norm": [{"q_norm": torch.ones(HEAD + 1)}, {"q_norm": torch.ones(2 * HEAD)[::2]}],
    "bias": [
        {"bias": torch.ones(HEADS * HEAD - 1)},
        {"bias": torch.ones(HEADS * HEAD).bfloat16()},
        {"part": "experts", "gate_up_bias": torch.ones(EXPERTS, HIDDEN)},
        {"part": "experts", "bias": torch.ones(EXPERTS).bfloat16()},
    ],
    "contiguous": [
        {"norms": (NORM._replace(weight=torch.ones(2 * DIM)[::2]), NORM)},
        {"part": "experts", "weight": torch.ones(DIM, EXPERTS).T},
    ],
}


@pytest.mark.parametrize(
    ("said", "change"), [(said, each) for said, changes in WRONG_PARTS.items() for each in changes]
)
def test_parts_that_do_not_fit_one_another_are_refused(said, change):
    with pytest.raises(ValueError, match=said):
        x, angles, rooms = inputs(2, torch.float32)
        decode([changed(**change)], x, angles, rooms)


def test_only_the_last_layer_may_end_behind_its_norm():
    x, angles, rooms = inputs(1, torch.float32, 2)
    stack = [layer(Kind(router=None), torch.float32), layer(Kind(), torch.float32)]
    with pytest.raises(ValueError, match="missing"):
        decode(stack, x, angles, rooms)
