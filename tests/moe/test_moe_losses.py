"""Router losses: their scale, their masks, their gradients, and that splits and ranks add up."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from expertly.moe.losses import (
    Totals,
    balance_counts,
    count,
    load_balancing_loss,
    probabilities,
    sequence_balancing_loss,
    z_loss,
)
from expertly.moe.routing import ROUTERS, Tokens, biased_sigmoid_topk, softmax_topk


def tokens_of(valid, sequence_id=None):
    sequence_id = torch.zeros(len(valid), dtype=torch.long) if sequence_id is None else sequence_id
    return Tokens(valid, sequence_id)


def share_of(routing, valid):
    return balance_counts(routing, valid) / valid.sum()


def balancing(logits, top_k, valid=None, share=None, totals=None):
    """One layer's loss over one batch, or a part of it with `share` and `totals` of the whole."""
    valid = torch.ones(len(logits), dtype=torch.bool) if valid is None else valid
    routing = softmax_topk(logits, top_k)
    share = share_of(routing, valid) if share is None else share
    totals = totals or count(tokens_of(valid))
    return load_balancing_loss(probabilities(logits, "softmax_topk"), valid, share, totals)


def logits_for(choices, experts, high=50.0):
    """Logits that choose exactly these experts, with equal probability: (tokens, experts)."""
    choices = torch.tensor(choices)
    return torch.zeros(len(choices), experts).scatter_(1, choices, high)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_at_balance_and_the_number_of_experts_when_collapsed(top_k):
    experts = 8
    even = [[(t * top_k + k) % experts for k in range(top_k)] for t in range(16)]
    assert balancing(logits_for(even, experts), top_k).item() == pytest.approx(top_k)
    collapsed = logits_for([list(range(top_k))] * 16, experts)
    assert balancing(collapsed, top_k).item() == pytest.approx(experts)
    assert balancing(torch.zeros(16, experts), top_k).item() == pytest.approx(top_k)


def test_layers_are_averaged_and_never_pooled():
    # each layer collapsed on its own pair of 8 experts: pooled over layers, that looks balanced
    layers = [logits_for([[2 * i, 2 * i + 1]] * 16, 8) for i in range(4)]
    ours = torch.stack([balancing(logits, 2) for logits in layers])
    assert ours.tolist() == pytest.approx([8.0] * 4)
    assert ours.mean().item() == pytest.approx(8.0)
    assert load_balancing_loss_func(tuple(layers), 8, 2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("padded", [False, True])
def test_equal_to_hugging_faces_loss_and_gradient_for_one_layer(padded):
    torch.manual_seed(0)
    mask = torch.ones(4, 16)
    if padded:
        mask[0, 9:], mask[2, :5] = 0, 0
    logits = torch.randn(64, 8, requires_grad=True)
    theirs = load_balancing_loss_func((logits,), 8, 2, mask)
    ours = balancing(logits, 2, mask.flatten().bool())
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_padding_changes_no_loss():
    torch.manual_seed(0)
    logits, noise = torch.randn(12, 4), torch.randn(5, 4) * 9
    both = torch.cat([logits, noise])
    valid = torch.arange(17) < 12
    tokens, alone = tokens_of(valid), tokens_of(valid[:12])
    assert count(tokens) == count(alone) == Totals(12, 1)
    torch.testing.assert_close(balancing(both, 2, valid), balancing(logits, 2))
    torch.testing.assert_close(
        z_loss(both, valid, count(tokens)), z_loss(logits, valid[:12], count(alone))
    )
    losses = [
        sequence_balancing_loss(softmax_topk(x, 2), x.softmax(-1), t, count(t))
        for x, t in ((both, tokens), (logits, alone))
    ]
    torch.testing.assert_close(*losses)


def test_the_global_scope_does_not_punish_pure_micro_batches():
    # two micro-batches of one domain each, on disjoint experts
    halves = [logits_for([[0, 1], [1, 0]] * 8, 4), logits_for([[2, 3], [3, 2]] * 8, 4)]
    micro = [balancing(half, 2).item() for half in halves]
    assert micro == pytest.approx([4.0, 4.0])
    whole = torch.cat(halves)
    share = share_of(softmax_topk(whole, 2), torch.ones(32, dtype=torch.bool))
    parts = [balancing(half, 2, share=share, totals=Totals(32, 2)) for half in halves]
    assert sum(parts).item() == pytest.approx(2.0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_shared_fractions_average_to_the_loss_of_the_whole_batch(ranks):
    torch.manual_seed(0)
    logits = (torch.randn(64, 8) + torch.arange(8) / 4).requires_grad_()
    whole = balancing(logits, 2)
    share = share_of(softmax_topk(logits, 2), torch.ones(64, dtype=torch.bool))
    local = [balancing(part, 2, share=share) for part in logits.chunk(ranks)]
    mean = torch.stack(local).mean()
    torch.testing.assert_close(mean, whole)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (mean, whole)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cut", [1, 7, 20, 31])
def test_uneven_micro_batches_with_padding_add_up(cut):
    torch.manual_seed(0)
    logits, valid = torch.randn(32, 8), torch.rand(32) < 0.7
    share = share_of(softmax_topk(logits, 2), valid)
    totals = Totals(int(valid.sum()), 1)
    cuts = [slice(0, cut), slice(cut, 32)]
    parts = [balancing(logits[c], 2, valid[c], share, totals) for c in cuts]
    torch.testing.assert_close(sum(parts), balancing(logits, 2, valid))
    torch.testing.assert_close(
        sum(z_loss(logits[c], valid[c], totals) for c in cuts), z_loss(logits, valid, totals)
    )


def slow_sequence_loss(logits, tokens, score, top_k):
    """DeepSeek-V3 eq. 17-20 sequence by sequence, times top_k; f from the choice without bias."""
    losses = []
    for sequence in tokens.sequence_id[tokens.valid].unique():
        mine = tokens.valid & (tokens.sequence_id == sequence)
        scores = score(logits[mine])
        experts = scores.shape[-1]
        chosen = torch.zeros(experts)
        for row in scores:
            for expert in row.topk(top_k).indices:
                chosen[expert] += 1
        f = experts / (top_k * len(scores)) * chosen
        p = (scores / scores.sum(-1, keepdim=True)).mean(0)
        losses.append(top_k * (f * p).sum())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["softmax_topk", "biased_sigmoid_topk"])
def test_the_sequence_loss_is_the_slow_one(name):
    torch.manual_seed(0)
    logits = torch.randn(40, 8)
    lengths = torch.tensor([3, 20, 1, 9, 7])
    sequence_id = torch.arange(5).repeat_interleave(lengths) * 10  # ids need not be dense
    valid = torch.rand(40) < 0.7
    valid[sequence_id == 20] = False  # a sequence of padding only
    tokens = Tokens(valid, sequence_id)
    bias = {"bias": torch.randn(8)} if ROUTERS[name].biased else {}
    routing = ROUTERS[name].route(logits, 2, **bias)
    totals = count(tokens)
    assert totals.sequences == 4
    ours = sequence_balancing_loss(routing, probabilities(logits, name), tokens, totals)
    torch.testing.assert_close(ours, slow_sequence_loss(logits, tokens, ROUTERS[name].score, 2))


def test_whole_sequences_in_several_micro_batches_add_up():
    torch.manual_seed(0)
    logits, sequence_id = torch.randn(24, 8), torch.arange(24) // 6
    tokens = Tokens(torch.ones(24, dtype=torch.bool), sequence_id)
    totals = count(tokens)

    def loss(rows):
        part = Tokens(*(values[rows] for values in tokens))
        return sequence_balancing_loss(
            softmax_topk(logits[rows], 2), logits[rows].softmax(-1), part, totals
        )

    whole = loss(slice(0, 24))
    torch.testing.assert_close(loss(slice(0, 6)) + loss(slice(6, 24)), whole)


def test_the_z_loss_shrinks_logits():
    torch.manual_seed(0)
    logits = (torch.randn(16, 8) * 3 + 2).requires_grad_()
    valid = torch.ones(16, dtype=torch.bool)
    before = z_loss(logits, valid, Totals(16, 1))
    (grad,) = torch.autograd.grad(before, logits)
    after = z_loss(logits - grad, valid, Totals(16, 1))
    assert after < before
    assert (grad * logits.logsumexp(-1, keepdim=True) >= 0).all()  # against the sign of log Z


def test_a_constant_shift_changes_the_z_loss_and_not_the_routing():
    torch.manual_seed(0)
    logits, valid = torch.randn(16, 8), torch.ones(16, dtype=torch.bool)
    shifted = logits + 5
    assert z_loss(shifted, valid, Totals(16, 1)) > z_loss(logits, valid, Totals(16, 1)) + 25
    before, after = softmax_topk(logits, 2), softmax_topk(shifted, 2)
    assert torch.equal(before.experts, after.experts)
    torch.testing.assert_close(before.weights, after.weights)


@pytest.mark.parametrize("name", [*ROUTERS])
def test_probabilities_are_shares_of_one(name):
    torch.manual_seed(0)
    logits = torch.randn(16, 8).bfloat16() * 5
    probs = probabilities(logits, name)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(16))


def test_sigmoids_that_underflow_are_no_nan():
    assert probabilities(torch.full((2, 4), -200.0), "biased_sigmoid_topk").isfinite().all()


def test_the_gradient_of_the_balancing_loss_evens_the_load():
    torch.manual_seed(0)
    logits = (torch.randn(64, 8) + torch.arange(8) / 3).requires_grad_()
    (grad,) = torch.autograd.grad(balancing(logits, 2), logits)
    pull = grad.sum(0)  # positive: descending lowers this expert's logits
    assert pull[-1] > 0 > pull[0]


def test_no_valid_token_costs_nothing():
    logits = torch.randn(4, 8, requires_grad=True)
    tokens = tokens_of(torch.zeros(4, dtype=torch.bool))
    totals = count(tokens)
    assert totals == Totals(0, 0)
    probs = probabilities(logits, "softmax_topk")
    losses = (
        load_balancing_loss(probs, tokens.valid, torch.zeros(8), totals)
        + sequence_balancing_loss(softmax_topk(logits, 2), probs, tokens, totals)
        + z_loss(logits, tokens.valid, totals)
    )
    assert losses == 0 and (torch.autograd.grad(losses, logits)[0] == 0).all()


def test_the_balance_losses_look_at_the_biased_choice():
    logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    routing = biased_sigmoid_topk(logits, 1, bias=torch.tensor([9.0, 0, 0, 0]))
    counts = balance_counts(routing, torch.ones(32, dtype=torch.bool))
    assert counts.tolist() == [32, 0, 0, 0] and counts.dtype == torch.float32
