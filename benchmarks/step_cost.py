"""What does a training step of an MoE cost against its dense twin's, and where does the gap go?

Run: python benchmarks/step_cost.py [--width 512] [--shapes 8,1 64,8] [--json] [key=value ...]
Every shape (experts, top_k) has the same active width, so the twin is always the same. Steps of
the MoE, the MoE on transformers' own grouped_mm, and the twin run in turn in one process. Then
each part is timed alone at the step's real shapes and routing, forward and backward, over all
layers; a part that the twin has too (products, gate, optimizer) counts as the difference. Times
are the least of all rounds, in milliseconds; ratios and the gap are medians over pairs of steps,
and `rest` is what the parts leave unexplained. On a CPU all are processor time of one thread, so
that other work on the machine hardly counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from operator import sub, truediv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step_time import DEMO
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from expertly.config import load
from expertly.kernels.experts import experts_forward
from expertly.kernels.gate import swiglu
from expertly.kernels.grouped import combine, dispatch, grouped_linear, sort_by_expert
from expertly.models.experts import EXPERTS
from expertly.moe.losses import Totals, load_balancing_loss, probabilities, z_loss
from expertly.moe.policy import Decision
from expertly.moe.routing import tokens_per_expert
from expertly.scale.reduce import sum_over_ranks
from expertly.train.config import TrainConfig
from expertly.train.evaluate import to_micro
from expertly.train.guard import Guard
from expertly.train.optimizer import clip
from expertly.train.setup import Job, prepare
from expertly.train.step import accumulate
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder
from expertly.watch.stats import watch_set

SHAPES = ((8, 1), (8, 2), (16, 2), (32, 2), (64, 2), (32, 4), (64, 4), (64, 8))
WARM_UP = 2
PARTS = ("products", "dispatch", "gate", "router", "losses", "optimizer", "recorder")

Move = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--width", type=int, default=512, help="top_k x the width of an expert")
    parser.add_argument("--shapes", nargs="*", default=[f"{e},{k}" for e, k in SHAPES])
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    head = ("experts", "top_k", "moe", "twin", "ratio", "stock", "gap", *PARTS, "rest")
    if not asked.json:
        print(" ".join(f"{name:>9}" for name in head), flush=True)
    for shape in asked.shapes:
        experts, top_k = map(int, shape.split(","))
        row = dict(zip(head, (experts, top_k, *measure(asked, experts, top_k)), strict=True))
        if asked.json:
            print(json.dumps(row), flush=True)
        else:
            digits = {"ratio": 2, "stock": 2}
            cells = (f"{value:9.{digits.get(name, 0)}f}" for name, value in row.items())
            print(" ".join(cells), flush=True)


def measure(asked: argparse.Namespace, experts: int, top_k: int) -> list[float]:
    """One row: moe, twin, their ratio, stock's ratio, the gap, its parts, the rest."""
    sizes = {"num_experts": experts, "num_experts_per_tok": top_k}
    sizes["moe_intermediate_size"] = asked.width // top_k
    given = [*asked.overrides, *(f"model.{key}={value}" for key, value in sizes.items())]
    configs = [load(TrainConfig, asked.config, [*given, f"model.twin={t}"]) for t in (False, True)]
    moe, twin = (Run(config) for config in configs)
    stock = ExpertsInterface()["grouped_mm"]
    seconds = least(
        [lambda: moe.step(experts_forward), lambda: moe.step(stock), twin.step], asked.rounds
    )
    ours, stocks, theirs = seconds
    ratios = [statistics.median(map(truediv, of, theirs)) for of in (ours, stocks)]
    gap = 1000 * statistics.median(map(sub, ours, theirs))
    parts = [1000 * part for part in parts_of(moe, twin, asked.rounds)]
    return [1000 * min(ours), 1000 * min(theirs), *ratios, gap, *parts, gap - sum(parts)]


class Run:
    """A training run that takes steps when it is told to."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.job: Job = prepare(config, None, lambda line: None)
        self.recorder = Recorder(self.job.attachment.rule) if self.job.attachment else None
        self.guard = Guard(config.optim)
        self.taken = 0

    def step(self, experts: Callable[..., Tensor] | None = None) -> None:
        if experts is not None:
            ExpertsInterface.register(EXPERTS, experts)
        train_step(self.config, self.job, self.recorder, self.guard, self.taken)
        self.taken += 1

    def gradient(self) -> None:
        """Everything of a step but the update, so that decisions and gradients are there."""
        job = self.job
        batch = [to_micro(next(job.batches), job.model.device)]
        accumulate(job.model, job.attachment, batch, self.config.router, None, job.autocast)

    def update(self) -> None:
        clip(self.job.model, self.config.optim.max_grad_norm)
        self.job.optimizer.step()


def least(moves: Sequence[Move], rounds: int) -> list[list[float]]:
    """Seconds of each move, in turn, without the first rounds, which allocate."""
    seconds: list[list[float]] = [[] for _ in moves]
    for step in range(WARM_UP + rounds):
        for move, values in zip(moves, seconds, strict=True):
            started = now()
            move()
            if step >= WARM_UP:
                values.append(now() - started)
    return seconds


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def parts_of(moe: Run, twin: Run, rounds: int) -> list[float]:
    """Seconds of the gap's PARTS, over all layers."""
    moe.step(experts_forward)
    moe.gradient()
    twin.gradient()
    attachment, config = moe.job.attachment, moe.config
    assert attachment is not None and attachment.tokens is not None and moe.recorder is not None
    dtype = torch.bfloat16 if config.schedule.bf16 else torch.float32
    sums = dict.fromkeys(PARTS, 0.0)
    blocks = [layer.mlp for layer in twin.job.model.model.layers]
    tokens, decisions = attachment.tokens, attachment.decisions
    for layer, decision, block in zip(attachment.layers, decisions, blocks, strict=True):
        moves = layer_moves(layer, decision, block, dtype)
        moves["losses"] = losses(decision, tokens.valid, attachment.rule)
        best = {
            name: min(t) for name, t in zip(moves, least(list(moves.values()), rounds), strict=True)
        }
        for name, value in best.items():
            part, _, sign = name.partition("-")
            sums[part] += -value if sign else value
    recorder = moe.recorder

    def record() -> None:
        recorder.add(decisions, attachment.tokens_by_layer)
        watch_set(recorder.read(sum_over_ranks), attachment.biases())

    ours, theirs, recorded = least([moe.update, twin.update, record], rounds)
    sums["optimizer"], sums["recorder"] = min(ours) - min(theirs), min(recorded)
    return [sums[name] for name in PARTS]


def layer_moves(layer: Any, decision: Decision, twin: Any, dtype: torch.dtype) -> dict[str, Move]:
    """The parts of one layer, and with a minus those that its twin has, too."""
    chosen, weights = decision.served.experts, decision.served.weights.detach().clone()
    w_up, w_down = layer.experts.gate_up_proj, layer.experts.down_proj
    width, dim, device = w_down.shape[-1], w_down.shape[1], w_down.device
    order = sort_by_expert(chosen, len(w_up))
    count, rows = len(chosen), chosen.numel()

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=kind, requires_grad=True)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(x, weight.to(dtype), order.counts)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(dtype))

    def routed(x: Tensor, packed: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        again = sort_by_expert(chosen, len(w_up))
        return dispatch(x, again), combine(packed, weights, again)

    weights.requires_grad_()
    packed, inner, x = draw(rows, dim), draw(rows, 2 * width), draw(count, dim)
    hidden, wide = draw(rows, width), draw(count, twin.gate_proj.out_features)
    other, router_x = draw(*wide.shape), draw(count, dim, kind=torch.float32)
    gate, up, down = (getattr(twin, f"{name}_proj").weight for name in ("gate", "up", "down"))
    return {
        "products": joined(both(product, packed, w_up), both(product, hidden, w_down)),
        "products-twin": joined(both(dense, x, gate), both(dense, x, up), both(dense, wide, down)),
        "dispatch": both(routed, x, packed, weights),
        "gate": both(swiglu, inner),
        "gate-twin": both(lambda a, b: F.silu(a) * b, wide, other),
        "router": both(lambda x: layer.router(x)[1], router_x),
    }


def losses(decision: Decision, valid: Tensor, rule: str) -> Move:
    """The load balancing loss and the z-loss of one layer."""
    logits = decision.chosen.logits.detach().clone().requires_grad_()
    totals = Totals(len(valid), 1)

    def loss(logits: Tensor) -> Tensor:
        share = tokens_per_expert(decision.chosen, valid).float() / totals.tokens
        probs = probabilities(logits, rule)
        return load_balancing_loss(probs, valid, share, totals) + z_loss(logits, valid, totals)

    return both(loss, logits)


def both(function: Callable[..., Any], *inputs: Tensor) -> Move:
    """Forward and backward of a function, with gradients of all inputs."""

    def move() -> None:
        out = function(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, inputs, [torch.ones_like(each) for each in outs])

    return move


def joined(*moves: Move) -> Move:
    return lambda: [move() for move in moves]


if __name__ == "__main__":
    main()
