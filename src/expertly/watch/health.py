"""Watch any MoE model's routers for as long as a block lasts, in anybody's loop.

    with Watch(model) as health:
        model(input_ids, attention_mask=mask)
        print(health.read()["alarms"])

It looks through hooks and leaves none behind; the model computes what it computes without it.
"""

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from expertly.errors import ExpertlyError
from expertly.models.attach import Attachment, attach, attached
from expertly.models.layers import moe_layers, own_policy
from expertly.models.loading import Model
from expertly.models.probe import OutputProbe
from expertly.watch.alarms import Alarms
from expertly.watch.recorder import Recorder, Reduce
from expertly.watch.stats import LayerCounts, watch_set

_PROBE_EVERY = 16  # forwards, from the first after each read


class Watch:
    """A context manager that counts every forward of a model, padding left out.

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

        Raises E504 when a router did not run, or no forward was seen.
        """
        if self._unseen is not None:
            why = "its router did not run in a forward of the model, so nothing is known of it"
            fix = "give the model another experts_implementation, or report this model family"
            raise ExpertlyError("E504", self._unseen, why, fix=fix)
        self.counts = self._recorder.read(self._reduce)
        self.norms = self._read_norms()
        self._reads += 1
        self._alarms.add(self._reads, self.counts, self.norms)
        self._forwards = 0
        self._probe.arm()
        at_work = attached(self._model)
        watched = watch_set(self.counts, at_work.biases() if at_work else None)
        return {**watched, "alarms": [alarm._asdict() for alarm in self._alarms.open]}

    def _read_norms(self) -> Tensor | None:
        norms = self._probe.read()
        if norms is None or self._reduce is None:
            return norms
        known = norms.isfinite()
        total, ranks = self._reduce([norms.where(known, 0.0), known.to(norms.dtype)])
        return total / ranks  # 0 / 0 is NaN

    def _count(self, model: nn.Module, args: tuple, output: object) -> None:
        attachment = self._attachment
        self._unseen = self._unseen or _unseen_layer(attachment)
        if self._unseen is None and attachment.tokens is not None:
            self._recorder.add(attachment.decisions, attachment.tokens)
        self._forwards += 1
        if self._forwards % _PROBE_EVERY == 0:
            self._probe.arm()


def _unseen_layer(attachment: Attachment) -> str | None:
    """The first layer whose router did not run in the latest forward."""
    pairs = zip(attachment.layers, attachment._decisions, strict=True)
    return next((layer.name for layer, decision in pairs if decision is None), None)
