"""Attention of one token, against slow definitions in double precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.kernels.native import library
from expertly.kernels.native_ops import (
    NORMS,
    AttentionForm,
    New,
    Room,
    operations,
)

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def turned(x, cos, sin):
    """x (batch, heads, dim); cos, sin (batch or 1, rotated)."""
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated], x[..., rotated:]
    a, b = part.chunk(2, dim=-1)
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([part * cos + torch.cat([-b, a], -1) * sin, rest], dim=-1)


def prepared(form, x, heads, weight, new):
    dim = form.head_dim
    x = x.double().view(len(x), -1)
    x = x.clamp(-form.clip, form.clip) if form.clip else x
    if form.norm == "all heads":
        x = normed(x, weight, form.eps)
    x = x.view(len(x), heads, dim)
    if form.norm == "each head":
        x = normed(x, weight, form.eps)
    x = turned(x, new.cos, new.sin)
    return normed(x, weight, form.eps) if form.norm == "each rotated head" else x


def slow_attention(form, new, room, length, q_norm, k_norm):
    """The answer (batch, heads * dim), and the new token's keys and values."""
    q = prepared(form, new.q, form.heads, q_norm, new)
    k = prepared(form, new.k, form.kv_heads, k_norm, new)
    v = new.v.double().view(k.shape)
    v = v.clamp(-form.clip, form.clip) if form.clip else v
    out = torch.empty_like(q)
    for row in range(len(q)):
        for head in range(form.heads):
            shared = head * form.kv_heads // form.heads
            keys = torch.cat([room.keys[row, shared, :length].double(), k[row, shared][None]])
            values = torch.cat([room.values[row, shared, :length].double(), v[row, shared][None]])
            out[row, head] = (keys @ q[row, head] * form.scale).softmax(0) @ values
    return out.flatten(1), k, v


def case(form, batch, length, dtype, *, rotated=None, size=None, together=True):
    dim, kv = form.head_dim, form.kv_heads
    rotated = dim if rotated is None else rotated
    shapes = [form.heads * dim, kv * dim, kv * dim]
    tensors = [random(batch, 1, each, seed=i).to(dtype) for i, each in enumerate(shapes)]
    angles = random(1 if together else batch, 1, rotated, seed=3)
    new = New(*tensors, angles.cos().to(dtype), angles.sin().to(dtype))
    size = length + 3 if size is None else size
    room = Room(*(random(batch, kv, size, dim, seed=4 + i).to(dtype) for i in range(2)))
    wide = {"none": None, "all heads": (form.heads, kv)}.get(form.norm, (1, 1))
    norms = [None if wide is None else random(w * dim, seed=6).abs() for w in wide or (0, 0)]
    return new, room, [None if each is None else each.to(dtype) for each in norms]


def check(native, form, batch, length, dtype, **changes):
    new, room, norms = case(form, batch, length, dtype, **changes)
    flat = New(*new[:3], new.cos.flatten(1), new.sin.flatten(1))
    want, keys, values = slow_attention(form, flat, room, length, *norms)
    before = room.keys.clone(), room.values.clone()
    got = native.attend(form, new, room, length, *norms)
    scale = 1 + want.abs().max()
    assert (got.double() - want).abs().max() <= DTYPES[dtype] * scale
    for cache, new_token, old in zip((room.keys, room.values), (keys, values), before, strict=True):
        assert (cache[:, :, length].double() - new_token).abs().max() <= DTYPES[dtype] * 4
        cache[:, :, length] = old[:, :, length]
        assert cache.equal(old)  # nothing else was written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 7, 100])
def test_attention_is_its_definition(native, norm, length, dtype):
    form = AttentionForm(4, 2, 32, 0.2, norm=norm, eps=1e-5)
    check(native, form, 2, length, dtype)


@given(st.data())
def test_attention_of_any_size(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim, batch = 32 * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    clip = draw(st.sampled_from([0.0, 0.7]))
    form = AttentionForm(kv * group, kv, dim, 0.3, clip, draw(st.sampled_from(NORMS)), 1e-6)
    changes = {
        "rotated": 2 * draw(st.integers(0, dim // 2)),
        "together": draw(st.booleans()),
    }
    dtype = draw(st.sampled_from(list(DTYPES)))
    check(operations(), form, batch, draw(st.integers(0, 40)), dtype, **changes)


def test_threads_do_not_change_the_answer(native):
    form, answers = AttentionForm(8, 8, 64, 0.1), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        new, room, _ = case(form, 2, 300, torch.bfloat16)
        answers.append(native.attend(form, new, room, 300))
    torch.set_num_threads(before)
    assert answers[0].equal(answers[1])
    assert answers[0].equal(answers[2])


def test_large_scores_do_not_overflow(native):
    form = AttentionForm(1, 1, 32, 1e3)
    new, room, _ = case(form, 1, 20, torch.float32)
    out = native.attend(form, new, room, 20)
    assert out.isfinite().all()
    want, *_ = slow_attention(
        form, New(*new[:3], new.cos[:, 0], new.sin[:, 0]), room, 20, None, None
    )
    assert (out.double() - want).abs().max() < 1e-3


FORM = AttentionForm(4, 2, 32, 0.2)


@pytest.mark.parametrize(
    ("form", "length", "changes", "said"),
    [
        (FORM, 9, {"size": 9}, "no room"),
        (FORM, -1, {"size": 9}, "no room"),
        (AttentionForm(3, 2, 32, 0.2), 2, {}, "heads must be"),
        (AttentionForm(4, 2, 48, 0.2), 2, {}, "heads must be"),
        (FORM, 2, {"rotated": 33}, "rotary"),
        (FORM, 2, {"rotated": 64}, "rotary"),
    ],
)
def test_bad_sizes_are_refused_before_anything_is_written(form, length, changes, said):
    new, room, _ = case(form, 1, max(length, 0), torch.float32, **changes)
    before = room.keys.clone()
    with pytest.raises(ValueError, match=said):
        operations().attend(form, new, room, length)
    assert room.keys.equal(before)


def test_tensors_that_do_not_fit_are_refused():
    new, room, _ = case(FORM, 2, 5, torch.float32)
    wrong = {
        "one shape": [
            new._replace(k=new.k[:1]),
            new._replace(q=new.q[..., :-1]),
            new._replace(v=new.v[:, :0]),
            new._replace(sin=new.sin[..., :-2]),
            new._replace(cos=new.cos.repeat(1, 2, 1), sin=new.sin.repeat(1, 2, 1)),
        ],
        "contiguous": [
            new._replace(q=new.q.bfloat16()),
            new._replace(k=torch.empty(64, 2).T.view(2, 1, 64)),
        ],
        "rotary": [new._replace(cos=new.cos.repeat(3, 1, 1), sin=new.sin.repeat(3, 1, 1))],
    }
    for said, news in wrong.items():
        for each in news:
            with pytest.raises(ValueError, match=said):
                operations().attend(FORM, each, room, 5)
    with pytest.raises(ValueError, match="norm of"):
        form = FORM._replace(norm="each head")
        operations().attend(form, new, room, 5, torch.ones(31), torch.ones(31))
    with pytest.raises(ValueError, match="norm"):
        operations().attend(FORM._replace(norm="each head"), new, room, 5)
    norm, form = torch.ones(32), FORM._replace(norm="each head")
    for pair in ((norm, norm.bfloat16()), (torch.ones(64)[::2], norm), (norm, norm.to("meta"))):
        with pytest.raises(ValueError, match="norm"):
            operations().attend(form, new, room, 5, *pair)
    half = New(*(each.half() for each in new))
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        operations().attend(FORM, half, Room(room.keys.half(), room.values.half()), 5)
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        operations().attend(form, new, room, 5, norm.half(), norm.half())
    with pytest.raises(ValueError, match="one shape"):
        Room(room.keys, room.values[:, :1])
    with pytest.raises(ValueError, match="contiguous"):
        Room(room.keys.mT, room.values.mT)
