"""Low-rank terms against a loop over rows, and against experts whose weights were added to."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn
from torch.testing import assert_close as close
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from expertly.kernels.experts import experts_forward
from expertly.kernels.low_rank import LowRank, low_rank_linear, low_rank_of
from expertly.kernels.packed import dequantize
from expertly.kernels.packed_experts import pack_experts, replace_experts
from expertly.moe.routing import softmax_topk

DIM, HIDDEN, EXPERTS, RANK = 32, 64, 4, 3
SIZES = {"hidden_size": DIM, "num_local_experts": EXPERTS}
MAKES = {
    "mixtral": (MixtralExperts, MixtralConfig(intermediate_size=HIDDEN, **SIZES)),
    # transposed, gates between ups, biases
    "gpt_oss": (GptOssExperts, GptOssConfig(intermediate_size=HIDDEN, **SIZES)),
    "nemotron": (  # no gate
        NemotronHExperts,
        NemotronHConfig(hidden_size=DIM, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS),
    ),
}


class Term(nn.Module):
    """Random factors beside one of an experts module's stacks."""

    def __init__(self, out, width):
        super().__init__()
        self.a = nn.Parameter(torch.randn(EXPERTS, RANK, width) * 0.2)
        self.b = nn.Parameter(torch.randn(EXPERTS, out, RANK) * 0.2)

    def factors(self):
        return LowRank(self.a, self.b, 0.5)

    def whole(self):
        """What is added: (experts, out, in)."""
        return 0.5 * self.b @ self.a


def experts_of(family):
    """An experts module without terms, and terms for it."""
    kind, config = MAKES[family]
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    terms = {
        up: Term((1 + experts.has_gate) * HIDDEN, DIM),
        "down_proj": Term(DIM, HIDDEN),
    }
    return experts, terms


@torch.no_grad()
def with_terms_added(experts, terms):
    """The same experts, their weights changed by the whole terms."""
    added = copy.deepcopy(experts)
    for name, term in terms.items():
        whole = term.whole()
        getattr(added, name).add_(whole.mT if experts.is_transposed else whole)
    return added


def routed(tokens=9):
    torch.manual_seed(1)
    x = torch.randn(tokens, DIM, requires_grad=True)
    logits = torch.randn(tokens, EXPERTS)
    logits[:, -1] = -50  # an expert without tokens
    routing = softmax_topk(logits, 2)
    return x, routing.experts, routing.weights


@settings(max_examples=20)
@given(
    counts=some.lists(some.integers(0, 4), min_size=1, max_size=4),
    rank=some.integers(1, 5),
    dtype=some.sampled_from([torch.float32, torch.float64]),
)
def test_each_row_goes_through_its_experts_factors(counts, rank, dtype):
    torch.manual_seed(sum(counts))
    x = torch.randn(sum(counts), 6, dtype=dtype, requires_grad=True)
    a = torch.randn(len(counts), rank, 6, dtype=dtype, requires_grad=True)
    b = torch.randn(len(counts), 5, rank, dtype=dtype, requires_grad=True)
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    slow = [0.7 * b[e] @ (a[e] @ row) for row, e in zip(x, owners, strict=True)]
    slow = torch.stack(slow) if slow else (x.sum() + a.sum() + b.sum()) * x.new_zeros(0, 5)
    fast = low_rank_linear(x, LowRank(a, b, 0.7), torch.tensor(counts))
    close(fast, slow)
    back = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad(fast, (x, a, b), back),
        torch.autograd.grad(slow, (x, a, b), back),
        strict=True,
    ):
        close(one, other, rtol=1e-4, atol=1e-5)


def test_factors_are_taken_in_the_dtype_of_the_rows():
    x, a, b = torch.randn(4, 8).bfloat16(), torch.randn(2, 3, 8), torch.randn(2, 5, 3)
    out = low_rank_linear(x, LowRank(a, b, 1.0), torch.tensor([1, 3]))
    assert out.dtype == torch.bfloat16 and out.shape == (4, 5)


def test_stacks_without_a_term():
    experts, terms = experts_of("mixtral")
    assert low_rank_of(experts, "down_proj") is None
    experts.low_rank = {"down_proj": terms["down_proj"]}
    assert low_rank_of(experts, "gate_up_proj") is None
    assert low_rank_of(experts, "down_proj").scaling == 0.5


@pytest.mark.parametrize("family", MAKES)
def test_terms_equal_weights_that_were_added_to(family):
    experts, terms = experts_of(family)
    x, index, weights = routed()
    wanted = experts_forward(with_terms_added(experts, terms), x, index, weights)
    experts.low_rank = terms
    close(experts_forward(experts, x, index, weights), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", MAKES)
def test_beside_packed_experts_as_beside_their_numbers(family, bits):
    """Outputs, and gradients of the terms, without and with gradients of x."""
    dense, terms = experts_of(family)
    packed = pack_experts(dense, bits)
    write_numbers(dense, packed)
    held = copy.deepcopy(dense)
    replace_experts(held, packed)
    x, index, weights = routed()
    factors = [factor for term in terms.values() for factor in (term.a, term.b)]
    dense.low_rank = held.low_rank = terms
    wanted = experts_forward(dense, x, index, weights)
    out = experts_forward(held, x, index, weights)
    close(out, wanted, rtol=1e-3, atol=1e-3)
    back = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, (x, *factors), back),
        torch.autograd.grad(wanted, (x, *factors), back),
        strict=True,
    ):
        close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    with torch.no_grad():  # inputs are rounded to 8 bits there
        close(experts_forward(held, x, index, weights), wanted, rtol=0.05, atol=0.1)


@torch.no_grad()
def write_numbers(experts, packed):
    """Give experts the numbers that packed weights stand for, in their own layout."""
    first, down = dequantize(packed.gate_up), dequantize(packed.down)
    if packed.gated and not experts.is_concatenated:
        first = torch.stack(first.chunk(2, dim=1), dim=2).flatten(1, 2)
    up = "gate_up_proj" if packed.gated else "up_proj"
    for name, weight in ((up, first), ("down_proj", down)):
        getattr(experts, name).copy_(weight.mT if experts.is_transposed else weight)
