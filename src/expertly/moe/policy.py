"""A routing policy: the rule with its options, and the capacity that limits it. Plain data."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError, nearest
from expertly.moe.capacity import Fill, Overflow, limit
from expertly.moe.routing import ROUTERS, Routing

NEEDS_BIAS = ("biased_sigmoid_topk", "biased_softmax_topk")


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
        plain = Policy(router=self.router, top_k=self.top_k, options=self.options)
        if self.router == "gshard_top2":
            return replace(plain, router="softmax_topk", options={"renormalize": True})
        if self.router == "switch_top1":
            return replace(plain, router="softmax_topk", options={"renormalize": False})
        return plain


class Decision(NamedTuple):
    """A router's own choice, and what capacity left of it (the same object when dropless)."""

    chosen: Routing  # what balance losses and biases look at
    served: Routing  # what the experts compute and the recorder counts


def check_policy(policy: Policy, num_experts: int) -> None:
    """Raises E204 for a policy that a causal model with `num_experts` experts cannot follow."""

    def refuse(why: str, fix: str) -> None:
        raise ExpertlyError("E204", f"router {policy.router}", why, fix=fix)

    if policy.router not in ROUTERS:
        refuse("no such router", nearest(policy.router, ROUTERS))
    if policy.router == "expert_choice":
        refuse("it looks at later tokens, so a causal model would cheat", "use softmax_topk")
    if not 1 <= policy.top_k <= num_experts:
        why = f"top_k {policy.top_k} with {num_experts} experts"
        refuse(why, f"choose a top_k from 1 to {num_experts}")
    fixed = {"switch_top1": 1, "gshard_top2": 2}.get(policy.router, policy.top_k)
    if policy.top_k != fixed:
        refuse(f"its top_k is {fixed}, not {policy.top_k}", f"set top_k to {fixed}")
    if min(policy.capacity_factor or 1, policy.eval_capacity_factor or 1) <= 0:
        refuse("a capacity factor must be above 0", "raise it, or null for dropless")
    if not 0 <= policy.jitter < 1:
        refuse(f"jitter {policy.jitter}", "choose one from 0 to below 1")


def decide(
    policy: Policy, logits: Tensor, valid: Tensor, *, bias: Tensor | None, training: bool
) -> Decision:
    """Apply a policy to logits (tokens, experts), float32. valid: (tokens,); bias: (experts,).

    gshard_top2 draws from torch's default generator in training, so a checkpointed forward that
    restores the generator decides the same twice.
    """
    options = dict(policy.options)
    if policy.router in NEEDS_BIAS:
        options["bias"] = bias
    if policy.router == "gshard_top2" and training:
        options["draw"] = torch.rand(len(logits), device=logits.device)
    router = ROUTERS[policy.router]
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
