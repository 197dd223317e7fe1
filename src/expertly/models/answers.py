"""How a family's router says what it decided, and how its experts are asked.

Most return (logits, weights, experts), and their experts take (hidden, experts, weights). The
others are translated here, to a Routing and back; a row of the family table names its way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertly.moe.routing import Routing, drop


class Answer(NamedTuple):
    """One way to talk. A router's output is a tuple of tensors, of whatever shapes."""

    read: Callable[[Any, tuple], Routing]  # (router, output)
    write: Callable[[Any, tuple, Routing], tuple]  # (router, its own output, routing) -> another
    # (router, its own output, routing) -> what the block makes of that routing by itself
    limit: Callable[[Any, tuple, Routing], Routing]
    # (experts' arguments, num_experts) -> tokens (rows, dim), the experts each goes to (rows, k)
    asked: Callable[[tuple, int], tuple[Tensor, Tensor]]
    # (experts module, tokens (assignments, dim), expert ids (assignments,)) -> its answers
    ask: Callable[[Any, Tensor, Tensor], Tensor]


# --- (logits, weights, experts): nearly all ----------------------------------------------------


def _read_triple(router: Any, output: tuple) -> Routing:
    return Routing(*output[:3])


def _write_triple(router: Any, output: tuple, routing: Routing) -> tuple:
    return (*routing[:3], *output[3:])


def _as_it_is(router: Any, output: tuple, routing: Routing) -> Routing:
    return routing


def _asked_triple(args: tuple, num_experts: int) -> tuple[Tensor, Tensor]:
    return args[0], args[1]


def _ask_triple(experts: Any, x: Tensor, expert: Tensor) -> Tensor:
    return experts.forward(x, expert.unsqueeze(-1), x.new_ones(len(x), 1))


# --- (probabilities, weights, experts): Gemma 4 multiplies weights by a scale per expert --------


def _read_scaled(router: Any, output: tuple) -> Routing:
    probs, weights, experts = output
    return Routing(probs.log(), weights / router.per_expert_scale[experts], experts)


def _write_scaled(router: Any, output: tuple, routing: Routing) -> tuple:
    weights = routing.weights * router.per_expert_scale[routing.experts]
    return routing.logits.softmax(dim=-1), weights, routing.experts


# --- (scores, logits): Llama 4 multiplies what an expert reads, and asks every expert ----------


def _read_scores(router: Any, output: tuple) -> Routing:
    scores, logits = output
    experts = logits.topk(router.top_k, dim=-1).indices
    return Routing(logits, scores.gather(-1, experts), experts)


def _write_scores(router: Any, output: tuple, routing: Routing) -> tuple:
    scores = torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.weights)
    return scores.to(output[0].dtype), routing.logits


def _asked_scores(args: tuple, num_experts: int) -> tuple[Tensor, Tensor]:
    """Every expert has a row for every token, of zeros where the token is not its own."""
    owned = args[0].unflatten(0, (num_experts, -1)).any(dim=-1).flatten().unsqueeze(-1)
    expert = torch.arange(num_experts, device=owned.device)
    expert = expert.repeat_interleave(len(owned) // num_experts).unsqueeze(-1)
    return args[0], expert.where(owned, num_experts)


def _ask_scores(experts: Any, x: Tensor, expert: Tensor) -> Tensor:
    return experts.forward(x)  # as many for each expert, in order


# --- (one expert as one-hot rows, its probability, logits): Switch Transformers ----------------


def _read_one_hot(router: Any, output: tuple) -> Routing:
    chosen, weights, logits = (tensor.flatten(0, 1) for tensor in output)
    routing = Routing(logits, weights, logits.argmax(dim=-1, keepdim=True))
    return drop(routing, chosen.any(dim=-1, keepdim=True))


def _write_one_hot(router: Any, output: tuple, routing: Routing) -> tuple:
    chosen = F.one_hot(routing.experts.squeeze(-1), router.num_experts)
    chosen = chosen if routing.kept is None else chosen * routing.kept
    probs = routing.weights.to(output[1].dtype)
    return (*(a.view_as(b) for a, b in zip((chosen, probs, routing.logits), output, strict=True)),)


def _within_capacity(router: Any, output: tuple, routing: Routing) -> Routing:
    """What the router's own expert_capacity, per sequence and in token order, leaves."""
    chosen = F.one_hot(routing.experts.squeeze(-1), router.num_experts).view_as(output[0])
    fits = chosen.cumsum(dim=-2).where(chosen.bool(), 0).amax(dim=-1) <= router.expert_capacity
    return drop(routing, fits.reshape(-1, 1))


def _asked_one_hot(args: tuple, num_experts: int) -> tuple[Tensor, Tensor]:
    chosen = args[1].squeeze(1)
    return args[0], chosen.argmax(dim=-1).where(chosen.any(dim=-1), num_experts).unsqueeze(-1)


def _ask_one_hot(experts: Any, x: Tensor, expert: Tensor) -> Tensor:
    chosen = F.one_hot(expert, len(experts))
    return experts.forward(x, chosen.unsqueeze(1), x.new_ones(len(x), 1))


ANSWERS = {
    "triple": Answer(_read_triple, _write_triple, _as_it_is, _asked_triple, _ask_triple),
    "scaled": Answer(_read_scaled, _write_scaled, _as_it_is, _asked_triple, _ask_triple),
    "scores": Answer(_read_scores, _write_scores, _as_it_is, _asked_scores, _ask_scores),
    "one_hot": Answer(
        _read_one_hot, _write_one_hot, _within_capacity, _asked_one_hot, _ask_one_hot
    ),
}
