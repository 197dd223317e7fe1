"""Watch any MoE model's routers for as long as a block lasts, in anybody's loop.

    with Watch(model) as health:
        model(input_ids, attention_mask=mask)
        print(health.read()["alarms"])

It looks through hooks and leaves none behind; the model computes what it computes without it.
"""

import logging
import math
import os
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from expertly.errors import ExpertlyError
from expertly.models.attach import attach, attached
from expertly.models.layers import moe_layers, own_policy
from expertly.models.loading import Model
from expertly.models.probe import OutputProbe
from expertly.watch.alarms import Alarms
from expertly.watch.recorder import Recorder, Reduce
from expertly.watch.stats import LayerCounts, watch_set

_log = logging.getLogger(__name__)

_PROBE_EVERY = 16  # forwards, from the first after each read


class Watch:
    """A context manager that counts every forward of a model, padding left out.

    Evaluations count too: in a training loop read before and after one.
    window: how many reads the alarms look at together. 1, for evaluation and audits: each read by
    itself; 48 for a training loop that reads at every step. reduce: sums tensors over ranks, as
    expertly.scale.reduce.sum_over_ranks does; then all ranks read together. counts and norms are
    those of the last read: the norms (layers, experts), NaN where unknown.
    Raises E306 for an unknown family, E305 for a model without an MoE layer.
    """

    def __init__(self, model: Model, *, window: int = 1, reduce: Reduce | None = None):
        layers, at_work = moe_layers(model), attached(model)
        policy = at_work and at_work.policy
        top_k = (policy or own_policy(model.config.to_dict())).top_k
        self.counts: LayerCounts | None = None
        self.norms: Tensor | None = None
        self._model, self._reduce = model, reduce
        self._alarms = Alarms(len(layers), layers[0].num_experts, top_k, window=window)
        self._reads = self._forwards = 0
        self._unseen: str | None = None  # a layer whose router did not run
        ranks = os.environ.get("WORLD_SIZE", "")  # as torchrun sets it
        if reduce is None and ranks.isdigit() and int(ranks) > 1:
            _log.warning(
                "Watch counts the tokens of this rank only; for all %s ranks: "
                "Watch(model, reduce=expertly.scale.reduce.sum_over_ranks)",
                ranks,
            )

    def __enter__(self) -> "Watch":
        self._attachment = attach(self._model)
        self._recorder = Recorder(self._attachment.rule)
        self._probe = OutputProbe(self._model)
        self._probe.arm()
        # after the attachment's, which says by then what was decided
        self._handle = self._model.register_forward_hook(self._count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._handle.remove()
        self._probe.detach()
        self._attachment.detach()

    def read(self) -> dict[str, Any]:
        """The watch set since the last read, and the open "alarms" as dicts; then start again.

        Raises E504 when a router did not run, or no forward was seen; with reduce on every rank.
        """
        self._check_seen()
        self.counts = self._recorder.read(self._reduce)
        self.norms = self._read_norms(self.counts)
        self._reads += 1
        self._alarms.add(self._reads, self.counts, self.norms)
        self._forwards = 0
        self._probe.arm()
        at_work = attached(self._model)
        watched = watch_set(self.counts, at_work.biases() if at_work else None)
        return {**watched, "alarms": [alarm._asdict() for alarm in self._alarms.open]}

    def _check_seen(self) -> None:
        """Raises E504 on every rank together: one that left alone would keep the others waiting."""
        blind = self._unseen is not None or self._forwards == 0
        if self._reduce is not None:
            flag = torch.tensor(float(blind), device=self._model.device)
            blind = bool(self._reduce([flag])[0])
        if not blind:
            return
        what, why = "router health", "another rank has nothing to read"
        fix = "see that rank's own error"
        if self._unseen is not None:
            what = self._unseen
            why = "its router did not run in a forward of the model, so nothing is known of it"
            fix = (
                "enter Watch before torch.compile's first step, give the model another "
                "experts_implementation, or report this model family"
            )
        elif self._forwards == 0:
            why = "no forward was recorded since the last read"
            fix = "call the model itself, model(input_ids), between two reads"
        raise ExpertlyError("E504", what, why, fix=fix)

    def _read_norms(self, counts: LayerCounts) -> Tensor | None:
        norms = self._probe.read()
        if self._reduce is None:
            return norms
        if norms is None:  # every rank takes part in every sum
            norms = torch.full_like(counts.load, math.nan, dtype=torch.float32)
        norms = norms.to(self._model.device)  # NCCL takes nothing else
        known = norms.isfinite()
        total, ranks = self._reduce([norms.where(known, 0.0), known.to(norms.dtype)])
        return (total / ranks).cpu()  # 0 / 0 is NaN

    def _count(self, model: nn.Module, args: tuple, output: object) -> None:
        attachment = self._attachment
        self._unseen = self._unseen or attachment.unseen()
        if self._unseen is None:
            self._recorder.add(attachment.decisions, attachment.tokens_by_layer)
        self._forwards += 1
        if self._forwards % _PROBE_EVERY == 0:
            self._probe.arm()
