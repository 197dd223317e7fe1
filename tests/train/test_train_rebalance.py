"""Rebalancing: what it draws anew, what it leaves alone, and that a collapsed run recovers."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from expertly.models.layers import moe_layers
from expertly.train.config import OptimConfig, RouterConfig
from expertly.train.guard import Guard
from expertly.train.optimizer import build_optimizer, set_learning_rate
from expertly.train.rebalance import Remedy, rebalance
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.alarms import Alarms, collapse
from expertly.watch.recorder import Recorder


def stepped(tiny, family, ids):
    """A tiny model after one optimizer step, its attachment and its optimizer."""
    model, attachment = tiny(family)
    routers = [layer.router for layer in attachment.layers]
    optimizer = build_optimizer(model, routers, OptimConfig(router_learning_rate=0.1))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for bias in attachment.bias:
        if bias is not None:
            bias.fill_(0.5)
    return model, attachment, optimizer


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "hunyuan_v1_moe"])
def test_only_the_collapsed_routers_are_drawn_anew(family, tiny, tiny_ids):
    model, attachment, optimizer = stepped(tiny, family, tiny_ids)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    known = len(optimizer.state)
    torch.manual_seed(3)
    rebalance(model, attachment, optimizer, [1])
    collapsed, other = (attachment.layers[index] for index in (1, 0))
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert all(name.startswith(f"{collapsed.name}.gate.") for name in changed)
    weight, other_weight = (next(layer.router.parameters()) for layer in (collapsed, other))
    assert weight.std().item() == pytest.approx(0.2, rel=0.2)  # the config's initializer_range
    assert weight not in optimizer.state and len(optimizer.state) == known - 1
    assert other_weight in optimizer.state
    if family == "deepseek_v3":
        assert attachment.bias[1].eq(0).all() and attachment.bias[0].eq(0.5).all()
    drawn = weight.detach().clone()
    torch.manual_seed(3)
    rebalance(model, attachment, optimizer, [1])
    assert torch.equal(weight, drawn), "a resumed run draws the same"
    model(tiny_ids, labels=tiny_ids).loss.backward()
    optimizer.step()
    assert not torch.equal(weight, drawn), "and goes on learning"


def test_a_selection_bias_of_two_axes_is_not_drawn_whatever_rule_decides(tiny, tiny_ids):
    """Ernie's is a frozen parameter (1, experts)."""
    other = {"router": "softmax_topk", "options": {}}
    model, attachment = tiny("ernie4_5_moe", policy=other)
    router = attachment.layers[0].router
    optimizer = build_optimizer(model, [router], OptimConfig())
    before = router.weight.clone()
    router.moe_statics.e_score_correction_bias.fill_(0.5)
    rebalance(model, attachment, optimizer, [0])
    assert not router.moe_statics.e_score_correction_bias.any()
    assert not router.weight.equal(before)


def test_each_remedy_is_stronger_and_json_holds_it():
    optim, router = OptimConfig(learning_rate=1e-3), RouterConfig(router_aux_loss_coef=0.03)
    none = Remedy()
    assert none.router(router) == router
    first, second = none.after(optim, [1]), none.after(optim, [1]).after(optim, [1, 2])
    assert (first.times, second.times) == (1, 2)
    assert second.aux_floor > first.aux_floor > 0
    other = first.after(optim, [0])
    assert other == replace(first, layers=[0, 1]), "not a relapse: the same dose"
    assert other.after(optim, [0]).times == 2
    assert first.router_lr_cap == 1e-3 and second.router_lr_cap < 1e-3
    assert first.router(router).router_aux_loss_coef == 0.03, "a floor, not a value"
    assert second.router(replace(router, router_aux_loss_coef=0)).router_aux_loss_coef > 0.01
    assert Remedy(**json.loads(json.dumps(asdict(second)))) == second


def test_the_cap_is_on_routers_alone(tiny, tiny_ids):
    model, attachment, optimizer = stepped(tiny, "qwen3_moe", tiny_ids)
    optim = OptimConfig(learning_rate=1e-3)
    Remedy().cap(optimizer, attachment)
    assert sorted({group["base_lr"] for group in optimizer.param_groups}) == [1e-3, 0.1]
    remedy = Remedy().after(optim, [1]).after(optim, [1])
    remedy.cap(optimizer, attachment)
    set_learning_rate(optimizer, 1.0)
    routers = {id(layer.router.weight) for layer in moe_layers(model)}
    for group in optimizer.param_groups:
        mine = {id(parameter) for parameter in group["params"]} & routers
        assert group["lr"] == (5e-4 if mine else 1e-3)


def trained(job, config, top_k, *, remedied, steps):
    """The steps of collapse alarms, and of the last 16 steps the collapse figure and mean loss."""
    layers = job.attachment.layers
    recorder, guard, remedy = Recorder(job.attachment.rule), Guard(config.optim), Remedy()
    alarms = Alarms(len(layers), layers[0].num_experts, top_k)
    raised, chosen, losses = [], [], []
    for step in range(steps):
        followed = replace(config, router=remedy.router(config.router))
        done = train_step(followed, job, recorder, guard, step)
        chosen.append(done.counts.chosen)
        losses.append(done.losses.cross_entropy)
        changes = alarms.add(step + 1, done.counts)
        found = [alarm.layer for alarm in changes.raised if alarm.kind == "collapse"]
        raised += [step + 1] * bool(found)
        if found and remedied:
            rebalance(job.model, job.attachment, job.optimizer, found)
            remedy = remedy.after(config.optim, found)
            remedy.cap(job.optimizer, job.attachment)
            alarms.reset(found)
    return raised, collapse(sum(chosen[-16:]), top_k).max().item(), sum(losses[-16:]) / 16


def test_a_collapsed_run_is_alarmed_and_recovers(configure, tmp_path):
    cause = (
        "model.num_experts=16",
        "router.router_aux_loss_coef=0",
        "router.router_z_loss_coef=0",
        "optim.router_learning_rate=0.2",
    )
    ends = []
    for name, remedied in (("left", False), ("remedied", True)):
        config = configure(tmp_path / name, "schedule.max_steps=70", *cause)
        job = prepare(config, None, lambda line: None)
        ends.append(trained(job, config, 2, remedied=remedied, steps=70))
    (first, ill, ill_loss), (again, well, well_loss) = ends
    assert first[0] == again[0] <= 50
    assert len(again) == 1 and well < 0.35 < 0.5 < ill, "the load recovers, and stays"
    assert well_loss < 1.05 * ill_loss
