"""The rules of the advice, one by one: each sees the facts and gives its reason, or None.

A reason speaks for the MoE or for a dense model. Those that decide do so alone, and all of them
are for dense: the model cannot be held, or something dense is simply the better choice here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertly.plan.memory import Memory, kv_cache
from expertly.plan.options import MOST_GPUS, Need, Option, ram, smallest, stays
from expertly.plan.shape import Shape, total
from expertly.plan.speed import Race
from expertly.plan.units import billions, gb, number

PACE = 5.0  # tokens per second and sequence: about as fast as people read
LEAD = 1.1  # times as fast; less is none, as the roofline is no more exact
TAX = 0.05  # of a step, from which on routing may eat the gain
SPREAD = 0.02  # of a step, as one standard deviation, that a latency target would notice
# Assumed. Sparse models overfit SuperGLUE's CB (250 examples, some 1e5 tokens) but not its ReCoRD
# (100,000 examples, some 3e7 tokens): ST-MoE (arXiv 2202.08906), section 4.
SMALL_SET = 1e7
_GOOD = "as good by the scaling law"
_CLEARLY = 2.0  # times as fast, for a dense model that nobody has trained to be preferred


class Reason(NamedTuple):
    """One argument. decides: it settles the choice, whatever the others say."""

    side: Literal["MoE", "dense"]
    text: str
    decides: bool = False


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the rules look at."""

    shape: Shape
    need: Need
    tokens: float | None  # of the fine-tuning set
    held: Memory
    enough: int | None  # the fewest GPUs that hold it
    ways: tuple[Option, ...]
    tax: float
    worth: float  # parameters of a dense model with its loss, by the scaling law
    extrapolated: bool  # by the law, as the model lies outside of what it was fitted on
    dense: Shape  # what it races: the model that is given, or one with all its parameters
    given: bool
    at_one: Race  # against it, with one sequence
    here: Race  # with the batch that is asked for
    fades: int | None
    peer: Shape  # the dense model that is as good: the one given if that is, else one made up
    peer_at_one: Race  # on no more GPUs than it takes: on more, routing and links are all there is
    peer_here: Race
    peer_ways: tuple[Option, ...]
    named: Shape  # the dense model to take instead: the one given, else the peer
    named_held: Memory
    named_enough: int | None
    named_ways: tuple[Option, ...]

    @property
    def as_good(self) -> bool:
        """Whether the dense model that is given is at least as good, by the scaling law."""
        return self.given and self.peer is self.dense

    @property
    def fits(self) -> bool:
        """Whether the MoE fits as it is asked for."""
        return self.held.total.resident <= self.need.room


def usable(ways: tuple[Option, ...], need: Need) -> tuple[Option, ...]:
    """Of some ways those on the GPUs at hand, at a reading pace if they offload."""
    return tuple(
        way
        for way in ways
        if way.fits and (not way.offloaded or way.tokens_per_second >= PACE * need.batch)
    )


def cannot_be_held(facts: Facts) -> Reason | None:
    """Memory below need, even with few bits and experts in RAM."""
    if usable(facts.ways, facts.need):
        return None
    slow = [way for way in facts.ways if way.fits]
    if slow:
        best = max(slow, key=lambda way: way.tokens_per_second)
        each = number(best.tokens_per_second / facts.need.batch)
        text = f"the fastest way to run it here, {best.what}, makes {each} tokens/s per sequence"
        return Reason("dense", f"{text}, under the {PACE:g} of a reader", decides=True)
    return Reason("dense", _too_large(facts.shape, facts.need), decides=True)


def small_set(facts: Facts) -> Reason | None:
    """Fine-tuning on little data: sparse models overfit it."""
    if facts.tokens is None:
        return None
    size = f"a fine-tuning set of {number(facts.tokens / 1e6)} M tokens"
    if facts.tokens >= SMALL_SET:
        text = f"{size} is large enough, but full fine-tuning keeps no gain over dense models"
        return Reason("dense", f"{text} (Artetxe et al. 2021)")
    text = f"{size} is small (under {SMALL_SET / 1e6:g} M, assumed), and sparse models overfit"
    return Reason("dense", f"{text} such sets (ST-MoE, section 4)", decides=True)


def too_small_to_route(facts: Facts) -> Reason | None:
    """The routing tax eats the gain: a dense model as good is as fast even at batch 1."""
    ratio = facts.peer_at_one.ratio
    if facts.tax < TAX or ratio >= 1 + TAX:
        return None
    spread = facts.enough and facts.enough < facts.need.gpus
    few = " on no more GPUs than it takes" if spread else ""
    text = (
        f"too small for the routing tax: routing takes {facts.tax:.0%} of a step, and even at "
        f"batch 1{few} it is {ratio:.2f} times as fast as {facts.peer.name}, {_GOOD}"
    )
    return Reason("dense", text, decides=True)


def outdone(facts: Facts) -> Reason | None:
    """It has to be made to fit, and a dense model as good loses less and is faster that way."""
    if facts.fits:
        return None
    margin = 1.0 if facts.as_good else _CLEARLY
    ways = [way for way in facts.peer_ways if way.fits]
    ours = usable(facts.ways, facts.need)
    better = [_better(way, ways, margin) for way in ours]
    if not better or None in better:
        return None
    pair = (_brief(way) for way in (better[0], ours[0]) if way)
    text = f"{facts.peer.name}, {_GOOD}, fits more easily: {'; the MoE: '.join(pair)}"
    return Reason("dense", text, decides=True)


def behind(facts: Facts) -> Reason | None:
    """At this batch a dense model that is as good is faster."""
    times = 1 / facts.peer_here.ratio
    if times < LEAD:
        return None
    batch = facts.need.batch
    why = ": so many tokens touch most of the experts" if batch > 1 else ""
    text = f"at batch {batch} {facts.peer.name}, {_GOOD}, is {times:.1f} times"
    return Reason("dense", f"{text} as fast{why}", decides=facts.as_good)


def several_gpus(facts: Facts) -> Reason | None:
    """Simple infrastructure: the dense model runs on one device, the MoE takes several."""
    if facts.enough == 1 or facts.named_enough != 1:
        return None
    many = f"{facts.enough:,}" if facts.enough else f"more than {MOST_GPUS:,}"
    one = f"{facts.named.name} runs on one {facts.need.device.name}"
    text = f"as asked {one}, the MoE takes {many} of them"
    if facts.as_good and facts.fits and facts.here.ratio < LEAD:
        return Reason("dense", f"{text} and is no faster at this batch", decides=True)
    return Reason("dense", text)


def misses(facts: Facts) -> Reason | None:
    """It does not fit as it is asked for."""
    if facts.fits:
        return None
    enough = facts.enough
    gpus = f"{enough or MOST_GPUS:,} GPUs would{'' if enough else ' not'} hold it"
    size = gb(facts.held.total.resident)
    dense = f"{facts.named.name} would take {gb(facts.named_held.total.resident)}"
    return Reason("dense", f"as asked it takes {size} of {place(facts.need)}; {gpus}; {dense}")


def holds(facts: Facts) -> Reason | None:
    """The memory is there."""
    if not facts.fits:
        return None
    text = f"as asked it takes {gb(facts.held.total.resident)} of {place(facts.need)}"
    sequence = kv_cache(facts.shape, facts.need.context, facts.need.kv_bits)
    left = facts.need.room - facts.held.total.resident + facts.held.kv_cache.resident
    more = int(left / sequence) - facts.need.batch if sequence else 0
    room = f"; the rest has room for the KV cache of {more:,} more sequences" if more else ""
    return Reason("MoE", text + room)


def leads(facts: Facts) -> Reason | None:
    """Its throughput at this batch against that of the dense model."""
    ratio, batch, fades = facts.here.ratio, facts.need.batch, facts.fades
    speed = number(facts.here.moe.tokens_per_second)
    held = "it makes" if facts.fits else "it would make, if it fitted,"
    text = f"at batch {batch} {held} {speed} tokens/s"
    at_one = f" (at batch 1 {facts.at_one.ratio:.2g} times)" if batch > 1 else ""
    if ratio < LEAD:
        text = f"{text}, {ratio:.2f} times those of {facts.dense.name}: no lead{at_one}"
        return Reason("dense", text)
    text = f"{text}, {ratio:.2g} times those of"
    until = f"; that lead is halved from batch {fades} on" if fades and batch < fades else at_one
    return Reason("MoE", f"{text} {facts.dense.name}{until}")


def is_worth(facts: Facts) -> Reason | None:
    """What it is as good as, by the scaling law."""
    law = "scaling law, here extrapolated," if facts.extrapolated else "scaling law"
    text = (
        f"by the {law} it is as good as a dense model of {billions(facts.worth)} trained on as "
        f"many tokens, and it computes with {billions(total(facts.shape).active)} per token"
    )
    if not facts.given:
        return Reason("MoE", text)
    has = f"{facts.dense.name} has {billions(total(facts.dense).total)}: compare real scores"
    return Reason("dense" if facts.as_good else "MoE", f"{text}; {has}")


def unsteady(facts: Facts) -> Reason | None:
    """Its steps vary with the experts that a batch happens to touch."""
    step = facts.here.moe
    spread = step.sigma / step.seconds
    if spread < SPREAD:
        return None
    text = f"a step of {step.seconds * 1e3:.3g} ms varies by {spread:.1%} (one sigma) with the"
    return Reason("dense", f"{text} experts that a batch touches; a dense model's does not")


RULES: tuple[Callable[[Facts], Reason | None], ...] = (
    cannot_be_held,
    small_set,
    too_small_to_route,
    outdone,
    behind,
    several_gpus,
    misses,
    holds,
    leads,
    is_worth,
    unsteady,
)


def place(need: Need) -> str:
    """The GPUs at hand and their memory together."""
    return f"{need.gpus} x {need.device.name} ({gb(need.room)})"


def _too_large(shape: Shape, need: Need) -> str:
    """Why no way holds it: what has to stay, or what there is room for elsewhere."""
    text = f"even at the fewest bits it takes {gb(smallest(shape, need))}"
    here = stays(shape, need)
    if here > need.room:
        link = need.device.host_link.name
        text = f"{text}, and with the experts over {link} there stay {gb(here)}"
        return f"{text}, more than {place(need)}"
    assumed = "" if need.ram is not None else " (assumed: 4 times as much)"
    room = f"{gb(ram(need))} of RAM for experts{assumed}"
    return f"{text}, more than {place(need)} and {room} hold"


def _better(way: Option, others: list[Option], margin: float) -> Option | None:
    """One of the others that loses no more quality and is faster by that factor."""
    enough = way.tokens_per_second * margin
    fine = (each for each in others if each.quality <= way.quality)
    return next((each for each in fine if each.tokens_per_second >= enough), None)


def _brief(way: Option) -> str:
    lost = f"loses {way.quality:.1f} points" if way.quality else "loses nothing"
    return f"{way.what} {lost} at {number(way.tokens_per_second)} tokens/s"
