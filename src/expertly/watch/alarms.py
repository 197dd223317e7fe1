"""When a router's numbers are an alarm: judged over the last steps, raised once, cleared once.

Fed with each step's counts and, now and then, the experts' output norms. Its whole memory is a
few tensors of fixed size, so a training checkpoint can hold it. It changes nothing: what to do
about an alarm is for whoever asked.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.watch.kinds import KINDS, Kind
from expertly.watch.stats import LayerCounts, entropy

WINDOW = 48  # steps
_NAMED = 8  # experts in a sentence at most
# the least even share, in assignments, from which a figure is not chance
ASSIGNMENTS = 50  # over the window, for an expert that gets none
# over the third of it: routing at random then looks collapsed less than once in 10 million times
# in the worst shape, half of the experts per token; with 8 it does once in 500 (4 of 8 experts)
CROWD = 24


class Alarm(NamedTuple):
    """One layer in trouble of one kind, in numbers and in words."""

    kind: str  # a name in KINDS
    layer: int  # of the MoE layers, from 0
    experts: list[int]  # the ones it is about; none: the whole layer
    step: int  # at which it began
    figure: float
    limit: float
    what: str
    advice: str


class Changes(NamedTuple):
    """What a step changed."""

    raised: list[Alarm]
    cleared: list[tuple[str, int]]  # (kind, layer)


class _Sums(NamedTuple):
    """What some of the last counts add up to, of what is judged."""

    chosen: Tensor  # (layers, experts), assignments before capacity
    served: Tensor  # (layers,), assignments after it
    confidence: Tensor  # (layers,), sum over tokens of the highest probability
    tokens: Tensor  # (layers,)


class _Finding(NamedTuple):
    """One kind's figures of all layers; NaN where it cannot be said."""

    figure: Tensor  # (layers,), the worst expert's where it is about experts
    experts: Tensor  # (layers, experts) bool


class Alarms:
    """A judge of router health.

    window: how many of the last counts it looks at together to find what lasts (dead, overflow);
    a third of them for what is urgent, which is then wholly in sight. 1 judges each count by
    itself, as an audit of a finished model does.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, window: int = WINDOW):
        self._top_k, self._window = top_k, window
        per_layer, per_expert = (num_layers,), (num_layers, num_experts)
        kinds = len(KINDS)
        self._state = {
            "chosen": torch.zeros(window, *per_expert, dtype=torch.float64),
            "served": torch.zeros(window, *per_layer, dtype=torch.float64),
            "confidence": torch.zeros(window, *per_layer, dtype=torch.float64),
            "tokens": torch.zeros(window, *per_layer, dtype=torch.float64),
            "seen": torch.zeros(per_layer, dtype=torch.int64),  # counts since the start or a reset
            "norms": torch.full(per_expert, math.nan, dtype=torch.float64),  # the last known
            # of the open alarms, kinds in the order of KINDS
            "began": torch.full((kinds, *per_layer), -1, dtype=torch.int64),  # -1: not open
            "figure": torch.zeros(kinds, *per_layer, dtype=torch.float64),
            "experts": torch.zeros(kinds, *per_expert, dtype=torch.bool),
        }

    def add(self, step: int, counts: LayerCounts, norms: Tensor | None = None) -> Changes:
        """Judge once more, with one step's counts; norms: (layers, experts), NaN where unknown."""
        self._remember(counts, norms)
        before = self._state["began"] >= 0
        for index, found in enumerate(self._findings()):
            self._settle(index, step, found)
        now = self._state["began"] >= 0
        raised = [self._alarm(*where) for where in (now & ~before).nonzero().tolist()]
        names = list(KINDS)
        ended = (before & ~now).nonzero().tolist()
        return Changes(raised, [(names[kind], layer) for kind, layer in ended])

    @property
    def open(self) -> list[Alarm]:
        """The alarms that have begun and not ended, with their figures of now."""
        return [self._alarm(*where) for where in (self._state["began"] >= 0).nonzero().tolist()]

    @property
    def norms(self) -> Tensor | None:
        """The last known output norms: (layers, experts), NaN where unknown; None before any."""
        norms = self._state["norms"]
        return norms.clone() if norms.isfinite().any() else None

    def reset(self, layers: list[int]) -> list[tuple[str, int]]:
        """Forget what was seen of some layers, because they were drawn anew.

        Returns the alarms that this ends, as (kind, layer).
        """
        ended = [(alarm.kind, alarm.layer) for alarm in self.open if alarm.layer in layers]
        for name in ("chosen", "served", "confidence", "tokens", "figure", "experts"):
            self._state[name][:, layers] = 0
        self._state["seen"][layers] = 0
        self._state["norms"][layers] = math.nan
        self._state["began"][:, layers] = -1
        return ended

    def state(self) -> dict[str, Tensor]:
        """All of its memory, for a checkpoint."""
        return {name: value.clone() for name, value in self._state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a memory that state() returned."""
        self._state = {name: state[name].clone() for name in self._state}

    def _remember(self, counts: LayerCounts, norms: Tensor | None) -> None:
        newest = {
            "chosen": counts.chosen,
            "served": counts.load.sum(dim=-1),
            "confidence": counts.confidence,
            "tokens": counts.tokens,
        }
        for name, value in newest.items():
            past = self._state[name].roll(-1, dims=0)
            past[-1] = value.cpu()
            self._state[name] = past
        self._state["seen"] += 1
        if norms is not None:
            norms = norms.cpu().double()
            self._state["norms"] = norms.where(norms.isfinite(), self._state["norms"])

    def _settle(self, index: int, step: int, found: _Finding) -> None:
        """Begin and end one kind's alarms. A figure that is not finite changes nothing."""
        kind, state = list(KINDS.values())[index], self._state
        began, known = state["began"][index], found.figure.isfinite()
        begins = known & _beyond(found.figure, kind.limit, kind) & (began < 0)
        if kind is KINDS["dead"]:  # in a collapse the others are, as its consequence
            begins &= state["began"][0] < 0
        began[begins] = step
        began[known & ~_beyond(found.figure, kind.clear, kind)] = -1
        is_open = began >= 0
        state["figure"][index] = found.figure.where(is_open & known, state["figure"][index])
        # between the two limits there may be none to name: then those that were named last
        named = (is_open & known & found.experts.any(dim=-1)).unsqueeze(-1)
        state["experts"][index] = found.experts.where(named, state["experts"][index])
        state["experts"][index][~is_open] = False

    def _alarm(self, kind: int, layer: int) -> Alarm:
        name = list(KINDS)[kind]
        rule, figure = KINDS[name], float(self._state["figure"][kind, layer])
        experts = self._state["experts"][kind, layer].nonzero().flatten().tolist()
        where = f"layer {layer}"
        if experts:
            rest = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
            named = ", ".join(map(str, experts[:_NAMED]))
            where += f", expert{'s' if len(experts) > 1 else ''} {named}{rest}"
        return Alarm(
            kind=name,
            layer=layer,
            experts=experts,
            step=int(self._state["began"][kind, layer]),
            figure=figure,
            limit=rule.limit,
            what=f"{where}: {rule.what.format(figure=figure)}",
            advice=rule.advice,
        )

    def _findings(self) -> list[_Finding]:
        """What the window says, in the order of KINDS."""
        long, short = self._over(self._window), self._over(max(1, self._window // 3))
        lasting, ratio = _ratio(long.chosen), _ratio(short.chosen)
        strength = _strength(self._state["norms"], ratio)
        enough = long.chosen.mean(dim=-1) >= ASSIGNMENTS
        assignments = long.chosen.sum(dim=-1)
        crowd = short.chosen.mean(dim=-1) >= CROWD
        whole_layer = torch.zeros_like(ratio, dtype=torch.bool)
        # with one expert per token, to be certain of it is what a router learns
        certain = short.confidence / short.tokens * (self._top_k > 1)
        return [
            _Finding(
                collapse(short.chosen, self._top_k).where(crowd, math.nan),
                ratio >= ratio.amax(-1, keepdim=True) / 2,
            ),
            _Finding(lasting.amin(dim=-1).where(enough, math.nan), lasting < KINDS["dead"].limit),
            _Finding(strength.amin(dim=-1), strength < KINDS["silent"].limit),
            _Finding((assignments - long.served) / assignments, whole_layer),
            _Finding(certain, whole_layer),
        ]

    def _over(self, steps: int) -> _Sums:
        """The sums of the last counts; NaN in a layer that has not seen so many."""
        short = self._state["seen"] < steps
        sums = _Sums(*(self._state[name][-steps:].sum(dim=0) for name in _Sums._fields))
        for each in sums:
            each[short] = math.nan
        return sums


def _ratio(chosen: Tensor) -> Tensor:
    """A load over an even share: (layers, experts); NaN without a token."""
    return chosen / chosen.mean(dim=-1, keepdim=True)


def _strength(norms: Tensor, ratio: Tensor) -> Tensor:
    """Output norms over their layer's median: (layers, experts); infinite where it can't be said.

    The median of those above 0: a layer whose experts are all silent has no other measure than 0.
    It is said of experts with an ordinary load: one with few tokens is dead, or dying.
    """
    # of two experts the stronger one is the measure, else the silent one would be its own
    speaking = norms.where(norms > 0, math.nan)
    median = speaking.nanquantile(0.5, dim=-1, keepdim=True, interpolation="higher")
    strength = (norms / median).where(norms != 0, 0.0)
    return strength.where((ratio >= 0.5) & strength.isfinite(), math.inf)


def collapse(chosen: Tensor, top_k: int) -> Tensor:
    """How collapsed a load is: (layers,), 0 even, 1 every token to the same top_k experts.

    The larger of two views: the entropy lost, of what can be lost; and the hottest expert, because
    with several experts per token a load can look even while one of them gets every token.
    chosen: (layers, experts) assignments before capacity. NaN without a token.
    """
    num_experts = chosen.shape[-1]
    if top_k >= num_experts:
        return chosen.new_zeros(len(chosen))
    most = math.log(num_experts)
    lost = (most - entropy(chosen)) / (most - math.log(top_k))
    if num_experts < 2 * top_k:  # an even share is most of the tokens
        return lost
    hottest = (_ratio(chosen).amax(dim=-1) - 1) / (num_experts / top_k - 1)
    # to the fourth: four of five tokens is a passing sight in healthy runs, nearly all is not
    return torch.maximum(lost, hottest**4)


def _beyond(figure: Tensor, level: float, kind: Kind) -> Tensor:
    """Whether figures lie on the bad side of a level; NaN does not."""
    return figure < level if kind.below else figure > level
