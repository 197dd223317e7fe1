"""One step's loss and gradient: the same however the batch is split, and what the formula says."""

import math

import pytest
import torch
from torch import nn

from expertly.train.config import RouterConfig
from expertly.train.step import MicroBatch, accumulate, cross_entropy, total_loss
from expertly.watch.recorder import Recorder
from expertly.watch.stats import watch_set

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
LENGTHS = (32, 3, 17, 9, 28, 1, 21, 12)  # of the 8 rows; one has no label at all
ALL_LOSSES = RouterConfig(
    router_aux_loss_coef=0.1, sequence_aux_loss_coef=0.05, router_z_loss_coef=0.01
)


def padded_batch() -> MicroBatch:
    draw = torch.Generator().manual_seed(1)
    mask = torch.arange(32) < torch.tensor(LENGTHS).unsqueeze(-1)
    ids = torch.randint(1, 300, (8, 32), generator=draw)
    return MicroBatch(ids.where(mask, 0), mask.long())


def split(batch: MicroBatch, parts: int) -> list[MicroBatch]:
    assert batch.attention_mask is not None
    pairs = zip(batch.input_ids.chunk(parts), batch.attention_mask.chunk(parts), strict=True)
    return [MicroBatch(ids, mask) for ids, mask in pairs]


def gradients(model: nn.Module, attachment, batch, parts: int, router: RouterConfig, **how):
    model.zero_grad()
    losses = accumulate(model, attachment, split(batch, parts), router, **how)
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far a is from b, in shares of b; 0 where both are 0."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def largest_difference(ours, whole) -> tuple[float, float]:
    """The largest relative difference of a loss, and of a parameter's gradient."""
    pairs = zip(ours[0], whole[0], strict=True)
    losses = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
    assert ours[1].keys() == whole[1].keys()
    return losses, max(relative(ours[1][name], whole[1][name]) for name in whole[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_do_not_depend_on_the_split(tiny, family):
    model, attachment = tiny(family)
    batch = padded_batch()
    whole = gradients(model, attachment, batch, 1, ALL_LOSSES)
    assert min(whole[0]) > 0.1, "every loss is on"
    assert len(whole[1]) == len(list(model.parameters()))
    for parts in (2, 4, 8):
        ours = gradients(model, attachment, batch, parts, ALL_LOSSES)
        loss, gradient = largest_difference(ours, whole)
        print(f"{family} in {parts}: loss {loss:.1e}, gradient {gradient:.1e}")
        assert loss < 1e-6
        assert gradient < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_formula_on_the_whole_batch(tiny, family):
    """Against loops over layers, tokens and experts, on what the stock routers return."""
    model, attachment = tiny(family)
    batch = padded_batch()
    ours = accumulate(model, attachment, split(batch, 4), ALL_LOSSES)
    attachment.detach()
    seen: list[tuple] = []
    for layer in attachment.layers:
        layer.router.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    slow = [slow_cross_entropy(logits, batch), *slow_router_losses(seen, family)]
    assert list(ours) == pytest.approx(slow, rel=2e-6)
    together = slow[0] + 0.1 * slow[1] + 0.05 * slow[2] + 0.01 * slow[3]
    assert total_loss(*ours, router=ALL_LOSSES) == pytest.approx(together, rel=2e-6)


def slow_cross_entropy(logits: torch.Tensor, batch: MicroBatch) -> float:
    terms = [
        -float(logits[row, at].double().log_softmax(-1)[batch.input_ids[row, at + 1]])
        for row, length in enumerate(LENGTHS)
        for at in range(length - 1)
    ]
    return sum(terms) / len(terms)


def slow_router_losses(seen: list[tuple], family: str) -> list[float]:
    """aux, sequence-wise aux and z, each the mean over layers, from stock router triples."""
    layers = [slow_layer(output[0].double(), output[2], family) for output in seen]
    return [sum(values) / len(layers) for values in zip(*layers, strict=True)]


def slow_layer(logits, chosen, family: str) -> tuple[float, float, float]:
    """The sequence-wise loss counts the best scores, without the bias that steers the choice."""
    kind = (lambda x: 1 / (1 + math.exp(-x))) if family == "deepseek_v3" else math.exp
    total, everywhere, by_row, z = sum(LENGTHS), [[0.0] * 8, [0.0] * 8], [], 0.0
    for row, length in enumerate(LENGTHS):
        counts, best, mass = [0.0] * 8, [0.0] * 8, [0.0] * 8
        for token in range(row * 32, row * 32 + length):
            values = [float(value) for value in logits[token]]
            z += math.log(sum(map(math.exp, values))) ** 2 / total
            scores = [kind(value) for value in values]
            for expert in range(8):
                mass[expert] += scores[expert] / sum(scores)
                counts[expert] += expert in chosen[token].tolist()
                best[expert] += scores[expert] in sorted(scores)[-2:]
        everywhere = [
            [e + r for e, r in zip(*pair, strict=True)]
            for pair in zip(everywhere, (counts, mass), strict=True)
        ]
        by_row.append(balance(best, mass, length))
    return balance(*everywhere, total), sum(by_row) / len(by_row), z


def balance(counts: list[float], mass: list[float], tokens: int) -> float:
    """experts x the sum over experts of load fraction x mean probability."""
    return 8 * sum(f / tokens * p / tokens for f, p in zip(counts, mass, strict=True))


def skewed(parts: int, tiny, **how):
    """A step on a batch whose rows each hold four tokens of their own, so their own experts too."""
    model, attachment = tiny("qwen3_moe")
    for layer in attachment.layers:
        layer.router.weight.data *= 30  # sure of itself, as a trained router is
    draw = torch.Generator().manual_seed(0)
    ids = 4 * torch.arange(8).unsqueeze(-1) + torch.randint(4, (8, 32), generator=draw)
    batch = MicroBatch(ids, torch.ones_like(ids))
    return gradients(model, attachment, batch, parts, RouterConfig(router_aux_loss_coef=1, **how))


def test_only_exact_and_global_is_independent_of_the_split(tiny):
    """On rows that differ; exact=false and scope=micro are documented as dependent."""
    whole = skewed(1, tiny)
    assert max(largest_difference(skewed(8, tiny), whole)) < 1e-6
    running, micro = skewed(8, tiny, exact=False), skewed(8, tiny, scope="micro")
    assert running[0].aux > 1.1 * whole[0].aux
    assert micro[0].aux > running[0].aux, "each row's own fractions are the most skewed"
    assert min(largest_difference(running, whole)) > 1e-3
    assert min(largest_difference(micro, whole)) > 1e-3
    for how in ({"exact": False}, {"scope": "micro"}):
        assert skewed(1, tiny, **how)[0] == whole[0], "one micro-batch is the whole batch"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_activation_checkpointing_changes_nothing(tiny, family):
    model, attachment = tiny(family)
    batch, recorder = padded_batch(), Recorder(attachment.rule)
    plain = gradients(model, attachment, batch, 2, ALL_LOSSES, recorder=recorder)
    counted = recorder.read()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, attachment, batch, 2, ALL_LOSSES, recorder=recorder)
    assert max(largest_difference(again, plain)) < 1e-6
    assert all(map(torch.equal, recorder.read(), counted)), "recomputation was counted"


def test_the_count_pass_is_not_recorded_and_padding_neither(tiny):
    model, attachment = tiny("qwen3_moe")
    recorder = Recorder(attachment.rule)
    gradients(model, attachment, padded_batch(), 4, ALL_LOSSES, recorder=recorder)
    counts = recorder.read()
    assert counts.tokens.eq(sum(LENGTHS)).all()
    assert counts.load.sum(dim=-1).tolist() == [2 * sum(LENGTHS)] * 2


def test_bf16_autocast_reaches_the_experts(tiny):
    """House rule 8: stock grouped_mm would leave them in float32. Routers stay in float32."""
    model, attachment = tiny("qwen3_moe")
    inside: list[torch.dtype] = []
    attachment.layers[0].experts.act_fn.register_forward_hook(
        lambda module, args, output: inside.append(args[0].dtype)
    )
    batch, cast = padded_batch(), torch.autocast("cpu", torch.bfloat16)
    full = gradients(model, attachment, batch, 2, ALL_LOSSES)
    half = gradients(model, attachment, batch, 2, ALL_LOSSES, autocast=cast)
    assert set(inside) == {torch.float32, torch.bfloat16}
    assert set(inside[len(inside) // 2 :]) == {torch.bfloat16}
    assert attachment.decisions[0].chosen.logits.dtype == torch.float32
    assert {gradient.dtype for gradient in half[1].values()} == {torch.float32}
    loss, gradient = largest_difference(half, full)
    assert 0 < loss < 0.01
    assert 0 < gradient < 0.5


def test_a_dense_model_has_cross_entropy_only(tiny):
    model, attachment = tiny("qwen3_moe")
    attachment.detach()
    batch = padded_batch()
    losses = accumulate(model, None, split(batch, 4), ALL_LOSSES)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert losses.cross_entropy == pytest.approx(slow_cross_entropy(logits, batch), rel=1e-6)
    assert losses[1:] == (0, 0, 0)


def test_losses_with_coefficient_0_are_reported_and_not_differentiated(tiny):
    model, attachment = tiny("qwen3_moe")
    off = RouterConfig(router_aux_loss_coef=0, router_z_loss_coef=0)
    losses, gradient = gradients(model, attachment, padded_batch(), 2, off)
    assert losses.aux > 1
    assert losses.z > 1
    attachment.detach()
    _, alone = gradients(model, None, padded_batch(), 2, off)
    assert max(relative(gradient[name], alone[name]) for name in alone) < 1e-6


@pytest.mark.parametrize(
    ("mask", "labels"),
    [
        pytest.param(None, [6, 7, 8, -100], id="none"),
        pytest.param([1, 1, 1, 1], [6, 7, 8, -100], id="ones"),
        pytest.param([1, 1, 0, 0], [6, -100, -100, -100], id="right"),
        pytest.param([0, 0, 1, 1], [-100, -100, 8, -100], id="left"),
        pytest.param([1, 0, 0, 0], [-100] * 4, id="one token"),
    ],
)
def test_labels(mask, labels):
    ids = torch.tensor([[5, 6, 7, 8]])
    micro = MicroBatch(ids, None if mask is None else torch.tensor([mask]))
    assert micro.labels().tolist() == [labels]
    assert micro.input_ids.tolist() == [[5, 6, 7, 8]], "left as it was"


def test_a_batch_without_labels_gives_no_loss(tiny):
    model, attachment = tiny("qwen3_moe")
    batch = MicroBatch(torch.ones(2, 4, dtype=torch.long), torch.eye(4, dtype=torch.long)[[0, 0]])
    assert accumulate(model, attachment, [batch], RouterConfig()).cross_entropy == 0
    assert cross_entropy(torch.randn(2, 4, 9), batch) == 0


def test_padding_never_moves_the_loss(tiny):
    model, attachment = tiny("mixtral")
    batch = padded_batch()
    other = MicroBatch(
        batch.input_ids.where(batch.attention_mask.bool(), 299), batch.attention_mask
    )
    first = accumulate(model, attachment, split(batch, 2), ALL_LOSSES)
    assert accumulate(model, attachment, split(other, 2), ALL_LOSSES) == pytest.approx(first)


def test_load_fractions_are_of_the_choice_before_capacity(tiny):
    """A capped load would hide a collapse from the loss."""
    model, attachment = tiny("qwen3_moe", policy={"capacity_factor": 0.5})
    recorder = Recorder(attachment.rule)
    losses = accumulate(model, attachment, [padded_batch()], RouterConfig(), recorder)
    counts = recorder.read()
    assert counts.chosen[0].sum() == 2 * sum(LENGTHS)
    assert counts.load.sum() < 0.9 * counts.chosen.sum()
    assert losses.aux == pytest.approx(watch_set(counts)["aux_loss"], rel=1e-6)
