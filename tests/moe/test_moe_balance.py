"""The selection bias: its sign, and that it evens a skewed load."""

import pytest
import torch

from expertly.moe.balance import update_bias
from expertly.moe.routing import biased_sigmoid_topk, tokens_per_expert


def test_overloaded_experts_lose_the_rate_and_underloaded_ones_gain_it():
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10, 2, 4, 0]), 0.001)  # mean 4
    assert bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.001])


@pytest.mark.parametrize("counts", [[5, 1, 0, 2], [0, 0, 0, 0]])
def test_a_rate_of_zero_leaves_the_bias_to_the_last_bit(counts):
    bias = torch.randn(4)
    before = bias.clone()
    update_bias(bias, torch.tensor(counts), 0.0)
    assert torch.equal(bias, before)


def test_no_token_moves_no_bias():
    bias = torch.ones(4)
    update_bias(bias, torch.zeros(4), 0.1)
    assert bias.tolist() == [1.0] * 4


def test_a_stored_bias_with_a_leading_axis_and_no_gradient():
    bias = torch.nn.Parameter(torch.zeros(1, 3), requires_grad=False)  # Ernie's shape
    update_bias(bias, torch.tensor([3.0, 0.0, 0.0]), 0.5)
    assert bias.tolist() == [[-0.5, 0.5, 0.5]]


@pytest.mark.parametrize("rate", [0.01, 0.003])
def test_a_constant_skewed_router_becomes_even_within_one_over_rate_steps(rate):
    generator = torch.Generator().manual_seed(0)
    # the last expert leads by 1.4 logits
    logits = torch.randn(4096, 8, generator=generator) + torch.arange(8) / 5
    bias = torch.zeros(8)

    def load():
        return tokens_per_expert(biased_sigmoid_topk(logits, 2, bias=bias)).float() / 1024

    assert load().max() > 1.5
    for _ in range(int(1 / rate)):
        update_bias(bias, load(), rate)
    assert (load() - 1).abs().max() < 0.1
    assert bias.argmin() == 7 and bias.argmax() == 0
