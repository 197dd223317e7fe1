"""The compiled kernels against slow double precision, on every instruction set of the machine."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.kernels import native
from expertly.kernels.native import Gate, Library, library
from expertly.kernels.packed import dequantize, pack

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not compiled")
BEST = 0 if library() is None else library().isa
CLOSE = 1e-5  # relative, with the rounding of activations emulated
EIGHT_BITS = 1.3e-2  # relative, with int8 activations


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_packed(*shape, bits, group=32, zeros=None, seed=0):
    """A packed weight of random levels, some scales negative."""
    torch.manual_seed(seed)
    if bits == 16:
        return pack((torch.randn(shape) / math.sqrt(shape[-1])).bfloat16(), None, None, 16, 0)
    q = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    groups = (*shape[:-1], shape[-1] // group)
    scales = (torch.randn(groups) / (1 << bits) / math.sqrt(shape[-1])).half()
    if zeros == torch.uint8:
        return pack(q, scales, torch.randint(0, 1 << bits, groups).byte(), bits, group)
    minima = None if zeros is None else (-(2 ** (bits - 1)) * scales.float() * 1.1).half()
    return pack(q, scales, minima, bits, group)


def rounded(x, bits):
    """Activations as the kernels take them: int8 in groups of 32 for 4 and 8 bits."""
    x = x.float()
    if bits == 16:
        return x.double()
    groups = x.view(*x.shape[:-1], x.shape[-1] // 32, 32)
    top = groups.abs().amax(-1, keepdim=True)
    # 127 / tensor would be 127 times its reciprocal, which rounds twice
    q = (groups * torch.where(top > 1e-30, torch.tensor(127.0) / top, 0)).round()
    return (q.double() * (top / 127).double()).view(x.shape)


def in_two_terms(x, bits):
    """Activations as plain linears take them: at 8 bits the rest is rounded once more."""
    first = rounded(x, bits)
    return first + rounded(x.float() - first.float(), 8) if bits == 8 else first


def slow_linear(x, weight, bias=None, expert=0, emulate=True, read=rounded):
    x = read(x, weight.bits) if emulate else x.double()
    out = x @ dequantize(weight, torch.float64, expert).mT
    return out if bias is None else out + bias.double()


def slow_gate(gate, inner):
    """act(gate) * up in double precision."""
    first, up = inner.chunk(2, dim=-1) if gate.gated else (inner, torch.ones(()))
    if gate.act == "clamped":
        first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
        return (up + 1) * first * torch.sigmoid(gate.alpha * first)
    acts = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }
    return acts[gate.act](first) * up


def slow_experts(layer, gate, x, ids, weights, emulate=True):
    """Each expert on the tokens that chose it, one choice at a time."""
    gate_up, down, gate_up_bias, down_bias = layer
    out = torch.zeros(len(x), down.shape[-2], dtype=torch.float64)
    for expert in range(gate_up.shape[0]):
        up_bias, bias = (None if b is None else b[expert] for b in (gate_up_bias, down_bias))
        for choice in range(ids.shape[1]):
            token = (ids[:, choice] == expert).nonzero().flatten()
            h = slow_gate(gate, slow_linear(x[token], gate_up, up_bias, expert, emulate))
            weight = weights[token, choice].double().unsqueeze(-1)
            out.index_add_(0, token, weight * slow_linear(h, down, bias, expert, emulate))
    return out


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


FORMS = [(4, None), (4, torch.uint8), (4, torch.float16), (16, None)]
FORMS += [(8, None), (8, torch.uint8), (8, torch.float16)]


@pytest.mark.parametrize(("bits", "zeros"), FORMS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_linear_equals_double_precision(kernels, bits, zeros, group):
    for tokens, out in ((1, 16), (2, 40), (3, 1), (5, 33), (13, 64), (40, 49)):
        weight = random_packed(out, 256, bits=bits, group=group, zeros=zeros, seed=tokens)
        x, bias = torch.randn(tokens, 256), torch.randn(out)
        [y] = kernels.linears([weight], [bias], x)
        assert error(y, slow_linear(x, weight, bias, read=in_two_terms)) < CLOSE
    limit = 1e-4 if bits == 8 else EIGHT_BITS  # two terms keep 15 bits
    assert error(y - bias, slow_linear(x, weight, emulate=False)) < limit


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes_give_the_same_on_every_instruction_set(data):
    bits, zeros = data.draw(st.sampled_from(FORMS))
    group = data.draw(st.sampled_from([32, 64, 128]))
    cols = group * data.draw(st.integers(1, 5)) if bits < 16 else data.draw(st.integers(1, 99))
    tokens, out = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 80))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    weight = random_packed(out, cols, bits=bits, group=group, zeros=zeros)
    x = torch.randn(tokens, cols).to(dtype)
    expected = slow_linear(x, weight, read=in_two_terms)
    for isa in range(BEST + 1):
        [y] = Library(library().handle, isa).linears([weight], [None], x)
        assert y.dtype == dtype and y.shape == (tokens, out)
        assert error(y, expected) < (CLOSE if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(("bits", "zeros"), FORMS)
@pytest.mark.parametrize("tokens", [7, 70])
def test_a_linear_wider_than_its_unpacked_weights_in_cache(kernels, bits, zeros, tokens):
    """More than four rows meet weights that are unpacked panel by panel."""
    weight = random_packed(40, 300 if bits == 16 else 1152, bits=bits, zeros=zeros)
    x, bias = torch.randn(tokens, weight.shape[-1]), torch.randn(40)
    [y] = kernels.linears([weight], [bias], x)
    assert error(y, slow_linear(x, weight, bias, read=in_two_terms)) < CLOSE


def test_linears_that_share_their_input_may_differ_in_everything_else(kernels, two_threads):
    weights = [random_packed(40 * (i + 1), 128, bits=b, zeros=z) for i, (b, z) in enumerate(FORMS)]
    biases = [None if i % 2 else torch.randn(w.shape[0]) for i, w in enumerate(weights)]
    x = torch.randn(2, 7, 128)
    outs = kernels.linears(weights, biases, x)
    for out, weight, bias in zip(outs, weights, biases, strict=True):
        assert out.shape == (2, 7, weight.shape[0])
        assert error(out, slow_linear(x, weight, bias, read=in_two_terms)) < CLOSE


@pytest.mark.parametrize(("bits", "zeros"), FORMS)
def test_a_grouped_linear_gives_each_expert_its_rows(kernels, two_threads, bits, zeros):
    weight = random_packed(5, 33, 128, bits=bits, zeros=zeros)
    x, bias = torch.randn(27, 128), torch.randn(5, 33)
    counts = torch.tensor([3, 0, 20, 4, 0])
    y = kernels.grouped_linear(weight, bias, x, counts)
    pieces = zip(x.split(counts.tolist()), range(5), strict=True)
    expected = torch.cat([slow_linear(part, weight, bias[e], e) for part, e in pieces])
    assert error(y, expected) < CLOSE


def random_layer(bits, down_bits, gate, *, dim=64, hidden=96, out=64, experts=6, biased=True):
    up = random_packed(experts, hidden * (1 + gate.gated), dim, bits=bits, seed=1)
    down = random_packed(experts, out, hidden, bits=down_bits, seed=2)
    if not biased:
        return up, down, None, None
    return up, down, torch.randn(up.shape[:2]), torch.randn(down.shape[:2])


def random_choice(tokens, top_k=3, experts=6):
    """Ids, some of which do not exist, and weights, some of which are 0."""
    ids = torch.rand(tokens, experts + 3).topk(top_k).indices - 1
    weights = torch.rand(tokens, top_k)
    weights[torch.rand(tokens, top_k) < 0.1] = 0
    return ids, weights


@pytest.mark.parametrize("act", native._ACTS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_experts_equal_their_definition(kernels, act, gated, bits):
    if act == "clamped" and not gated:
        pytest.skip("gpt-oss has a gate")
    torch.manual_seed(bits)
    gate = Gate(act, gated, 1.702, 1.5)
    layer = random_layer(bits, bits, gate)
    for tokens in (1, 4, 33):
        x, (ids, weights) = torch.randn(tokens, 64), random_choice(tokens)
        y = kernels.experts(*layer, gate, x, ids, weights)
        exact = slow_experts(layer, gate, x, ids, weights, emulate=False)
        assert error(y, exact) < EIGHT_BITS
        # rounding h may go either way where a sum differs in the last bit
        limit = CLOSE if bits == 16 else 2e-3
        assert error(y, slow_experts(layer, gate, x, ids, weights)) < limit


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("tokens", [7, 70])
def test_experts_wider_than_their_unpacked_weights_in_cache(kernels, bits, tokens):
    torch.manual_seed(bits)
    dim, hidden = (300, 304) if bits == 16 else (1152, 1152)
    gate, sizes = Gate("silu"), {"dim": dim, "hidden": hidden, "experts": 2}
    layer = random_layer(bits, bits, gate, **sizes)
    x, ids = torch.randn(tokens, dim), torch.tensor([[0, 1]]).repeat(tokens, 1)
    weights = torch.rand(tokens, 2)
    limit = CLOSE if bits == 16 else 2e-3
    found = kernels.experts(*layer, gate, x, ids, weights)
    assert error(found, slow_experts(layer, gate, x, ids, weights)) < limit


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_experts_of_any_size(data):
    bits, down_bits = data.draw(
        st.sampled_from([(4, 4), (8, 8), (16, 16), (4, 8), (16, 4), (8, 16)])
    )
    step = 16 if down_bits == 16 else 32
    hidden = step * data.draw(st.integers(1, 6))
    dim = data.draw(st.integers(1, 70)) if bits == 16 else 32 * data.draw(st.integers(1, 5))
    out, tokens = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 40))
    top_k = data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    gate = Gate("silu", data.draw(st.booleans()))
    biased = data.draw(st.booleans())
    layer = random_layer(bits, down_bits, gate, dim=dim, hidden=hidden, out=out, biased=biased)
    x, (ids, weights) = torch.randn(tokens, dim).to(dtype), random_choice(tokens, top_k)
    expected = slow_experts(layer, gate, x, ids, weights)
    for isa in range(BEST + 1):
        y = Library(library().handle, isa).experts(*layer, gate, x, ids, weights)
        assert y.dtype == dtype and y.shape == (tokens, out)
        assert error(y, expected) < 6e-3


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_second_thread_changes_no_bit(kernels, two_threads, bits):
    gate, layer = Gate("silu"), random_layer(bits, bits, Gate("silu"), out=300)
    for tokens in (1, 70, 700):
        x, (ids, weights) = torch.randn(tokens, 64), random_choice(tokens)
        y = kernels.experts(*layer, gate, x, ids, weights)
        torch.set_num_threads(1)
        assert torch.equal(y, kernels.experts(*layer, gate, x, ids, weights))
        torch.set_num_threads(2)


def test_a_token_without_experts_gets_zeros(kernels):
    layer = random_layer(4, 4, Gate("silu"))
    x, ids = torch.randn(2, 64), torch.tensor([[-1, 6], [2, 3]])
    y = kernels.experts(*layer, Gate("silu"), x, ids, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(y, torch.zeros(2, 64))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_segmented_prefill_is_the_same_token_by_token(bits):
    gate, layer = Gate("silu"), random_layer(bits, bits, Gate("silu"), out=48)
    x = torch.randn(4100, 64)
    ids, weights = random_choice(4100)
    y = library().experts(*layer, gate, x, ids, weights)
    for token in (0, 4095, 4096, 4099):
        one = slice(token, token + 1)
        alone = library().experts(*layer, gate, x[one], ids[one], weights[one])
        torch.testing.assert_close(y[one], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act", native._ACTS)
def test_a_gate_of_large_negative_numbers_is_closed(kernels, act):
    """Each value is its own gate and, but for its sign, its own up."""
    x = torch.tensor([-1e30, -1e19, -1e4, -90, -89, -88.5, -88.4, -88.3, -80, -20, -1, 0, 1, 9, 20])
    x, one = F.pad(x, (0, 1)), torch.eye(16)
    gate_up = pack(torch.cat([one, -one]).bfloat16()[None], None, None, 16, 0)
    down = pack(one.bfloat16()[None], None, None, 16, 0)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    found = kernels.experts(gate_up, down, None, None, Gate(act), x[None], ids, weights)[0]
    want = slow_gate(Gate(act), torch.cat([x, -x]).double()).float()
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_is_not_a_number_stays_visible(kernels, bits, bad):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    [y] = kernels.linears([random_packed(20, 64, bits=bits)], [None], x)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()


def test_zeros_and_tiny_activations_give_zeros(kernels):
    x = torch.zeros(2, 64)
    x[1] = 1e-38
    [y] = kernels.linears([random_packed(20, 64, bits=8)], [None], x)
    assert torch.equal(y, torch.zeros(2, 20))
