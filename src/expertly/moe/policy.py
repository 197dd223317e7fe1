"""A routing policy: the rule with its options, and the capacity that limits it. Plain data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError, nearest
from expertly.moe.capacity import Fill, Overflow, limit
from expertly.moe.routing import ROUTERS, Router, Routing

# as the messages of expertly.config say them
_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "quoted text"}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What decides where a token goes; the same for every MoE layer of a model."""

    router: str  # a name in ROUTERS
    top_k: int
    options: dict[str, Any] = field(default_factory=dict)  # of the rule: renormalize, scale, ...
    jitter: float = 0.0  # router input times U(1 - jitter, 1 + jitter), in training
    capacity_factor: float | None = None  # None: dropless
    eval_capacity_factor: float | None = None
    overflow: Overflow = "drop"
    fill: Fill = "choice"

    def at_inference(self) -> "Policy":
        """The same policy without what only steers training, under its plainest name."""
        router, options = ROUTERS[self.router].plain or (self.router, self.options)
        return Policy(router=router, top_k=self.top_k, options=dict(options))


class Decision(NamedTuple):
    """A router's own choice, and what capacity left of it (the same object when dropless)."""

    chosen: Routing  # what balance losses and biases look at
    served: Routing  # what the experts compute and the recorder counts


def check_policy(policy: Policy, num_experts: int) -> None:
    """Raises E204 for a policy that a causal model with `num_experts` experts cannot follow."""
    for why, fix in chain(_rule_problems(policy, num_experts), _limit_problems(policy)):
        raise ExpertlyError("E204", f"router {policy.router}", why, fix=fix)


def _rule_problems(policy: Policy, num_experts: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the rule, as (why, fix); the caller stops at the first."""
    if policy.router not in ROUTERS:
        yield "no such router", nearest(policy.router, ROUTERS)
    router = ROUTERS[policy.router]
    if not router.causal:
        yield "it looks at later tokens, so a causal model would cheat", "use softmax_topk"
    if not 1 <= policy.top_k <= num_experts:
        why = f"top_k {policy.top_k} with {num_experts} experts"
        yield why, f"choose a top_k from 1 to {num_experts}"
    if router.top_k not in (None, policy.top_k):
        yield f"its top_k is {router.top_k}, not {policy.top_k}", f"set top_k to {router.top_k}"
    yield from _option_problems(policy)
    yield from _group_problems(policy, num_experts)


def _option_problems(policy: Policy) -> Iterator[tuple[str, str]]:
    """Options that the rule does not have, or with values that it cannot take."""
    defaults = rule_defaults(ROUTERS[policy.router])
    kinds = {name: type(default) for name, default in defaults.items()}
    for name, value in policy.options.items():
        if name not in kinds:
            yield f"no option {name}", nearest(name, kinds) if kinds else "leave options empty"
        elif not _fits(value, kinds[name]):
            yield f"option {name} is {value!r}", f"set {name} to {_WORDS[kinds[name]]}"


def rule_defaults(router: Router) -> dict[str, Any]:
    """The options that a user may give a rule, with their defaults.

    They are its keyword arguments; the tensors among them have no default, or None.
    """
    parameters = signature(router.route).parameters.values()
    options = (p for p in parameters if p.kind is p.KEYWORD_ONLY)
    return {p.name: p.default for p in options if p.default not in (p.empty, None)}


def _fits(value: Any, kind: type) -> bool:
    """Whether an option of this kind can take the value; a whole number is a float, too."""
    if kind is float and type(value) in (int, float):
        return abs(value) <= torch.finfo(torch.float32).max  # what routing runs in
    return type(value) is kind  # not isinstance: True is an int to Python


def _group_problems(policy: Policy, num_experts: int) -> Iterator[tuple[str, str]]:
    """What is wrong with a limit on groups of experts."""
    groups, used = (policy.options.get(name, 1) for name in ("num_groups", "topk_groups"))
    best = policy.options.get("best", 1)
    if best < 1:
        yield f"option best is {best}", "set best to 1 or more"
    least = max(ROUTERS[policy.router].smallest_group, best) if groups > 1 else 1
    if groups < 1 or num_experts % groups or num_experts // groups < least:
        why = f"{num_experts} experts in {groups} groups"
        yield why, f"choose num_groups for equal groups of at least {least}"
    if not 1 <= used <= groups:
        yield f"{used} of {groups} groups", f"choose topk_groups from 1 to {groups}"
    if policy.top_k > used * (num_experts // groups):
        yield f"{used} of {groups} groups hold fewer than top_k experts", "raise topk_groups"


def _limit_problems(policy: Policy) -> Iterator[tuple[str, str]]:
    """What is wrong with capacity or jitter."""
    for factor in (policy.capacity_factor, policy.eval_capacity_factor):
        if factor is not None and not 0 < factor < math.inf:
            yield "a capacity factor must be above 0", "raise it, or null for dropless"
    if not 0 <= policy.jitter < 1:
        yield f"jitter {policy.jitter}", "choose one from 0 to below 1"


def decide(
    policy: Policy, logits: Tensor, valid: Tensor, *, bias: Tensor | None, training: bool
) -> Decision:
    """Apply a policy to logits (tokens, experts), float32. valid: (tokens,); bias: (experts,).

    A rule that draws does so from torch's default generator, so a checkpointed forward that
    restores the generator decides the same twice.
    """
    router = ROUTERS[policy.router]
    options = dict(policy.options)
    if router.biased:
        options["bias"] = bias
    if router.draws and training:
        options["draw"] = torch.rand(len(logits), device=logits.device)
    chosen = router.route(logits, policy.top_k, **options)
    factor = policy.capacity_factor if training else policy.eval_capacity_factor
    if factor is None:
        return Decision(chosen, chosen)
    served = limit(
        chosen,
        router.score(logits),
        valid,
        capacity_factor=factor,
        overflow=policy.overflow,
        fill=policy.fill,
    )
    return Decision(chosen, served)
