"""Count what routers decided, outside autograd, once per micro-batch; read once per step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.moe.losses import balance_counts, probabilities, squared_log_z
from expertly.moe.policy import Decision
from expertly.moe.routing import Tokens, tokens_per_expert
from expertly.watch.stats import LayerCounts

# tensors, each summed over all ranks: expertly.scale.reduce.sum_over_ranks
Reduce = Callable[[Sequence[Tensor]], list[Tensor]]


class Recorder:
    """Sums the counts of one optimizer step over its micro-batches.

    It holds (layers, experts) numbers and nothing of the batch, however long the run.
    """

    def __init__(self, router: str):
        self._router = router
        self._sums: LayerCounts | None = None

    def add(self, decisions: Sequence[Decision], tokens: Sequence[Tokens]) -> None:
        """Count one micro-batch: per MoE layer its decision and which of its tokens are valid."""
        counts = count_decisions(decisions, tokens, self._router)
        if self._sums is None:
            self._sums = counts
        else:
            self._sums = LayerCounts(*(a + b for a, b in zip(self._sums, counts, strict=True)))

    def read(self, reduce: Reduce | None = None) -> LayerCounts:
        """The counts since the last read, on the CPU, and start again.

        reduce: adds them up over ranks. Raises E504 when nothing was recorded.
        """
        if self._sums is None:
            why = "no forward was recorded since the last read"
            fix = "call the model itself, model(input_ids), between two reads"
            raise ExpertlyError("E504", "router health", why, fix=fix)
        counts, self._sums = self._sums, None
        if reduce is not None:
            counts = LayerCounts._make(reduce(counts))
        # small tensors: to move them once costs less than each figure's own wait for the device
        return LayerCounts(*(values.cpu() for values in counts))


@torch.no_grad()
def count_decisions(
    decisions: Sequence[Decision], tokens: Sequence[Tokens], router: str
) -> LayerCounts:
    """What one micro-batch's decisions add up to, per MoE layer; padding is not counted."""
    pairs = zip(decisions, tokens, strict=True)
    layers = [_count_layer(decision, seen, router) for decision, seen in pairs]
    return LayerCounts._make(torch.stack(each).double() for each in zip(*layers, strict=True))


def _count_layer(decision: Decision, tokens: Tokens, router: str) -> tuple[Tensor, ...]:
    """One layer's part of LayerCounts, in its order."""
    served, valid = decision.served, tokens.valid
    probs = probabilities(served.logits, router) * valid.unsqueeze(-1)  # (tokens, experts)
    weights = (served.weights * valid.unsqueeze(-1)).to(probs.dtype)  # 0 where dropped
    mass = probs.new_zeros(probs.shape[-1])
    mass = mass.scatter_add_(0, served.experts.flatten(), weights.flatten())
    return (
        tokens_per_expert(served, valid),
        balance_counts(decision.chosen, valid),
        mass,
        probs.amax(dim=-1).sum(),
        (squared_log_z(served.logits) * valid).sum(),
        probs.sum(dim=0),
        valid.sum(),
    )
