"""MoE or dense, and what would make it fit: a verdict with its reasons and numbers.

facts_of gathers what there is to know, reasons.RULES judge it one by one, and the choice follows:
dense if a rule decides so, the MoE if it fits as it is asked for, else the ways to make it fit.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from expertly.plan import scaling
from expertly.plan.memory import Memory, require
from expertly.plan.options import MOST_GPUS, Need, Option, asked, fewest_gpus, options
from expertly.plan.precision import FORMATS, Precision
from expertly.plan.reasons import LEAD, RULES, Facts, Reason, place, usable
from expertly.plan.shape import Layer, Shape, rival, total
from expertly.plan.speed import batches_with, fades_at, race, routing_tax
from expertly.plan.units import billions, gb, number

_AS_LARGE = "a dense model with all its parameters"
_KEPT = 0.9  # of the memory for weights, the rest for the cache and activations

Choice = Literal["MoE", "dense", "make it fit"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The choice, one sentence of why, and all reasons: those that decide first."""

    choice: Choice
    summary: str
    reasons: tuple[str, ...]
    options: tuple[Option, ...]  # those on the GPUs at hand first; by quality loss, then speed


def advise(
    shape: Shape,
    dense: Shape | None,
    need: Need,
    *,
    train_tokens: float,
    tokens: float | None = None,
    dense_precision: Precision | None = None,
) -> Verdict:
    """Whether to choose this MoE or a dense model, and how to run it on what there is.

    dense: the model to compare with; None: dense models of the same make. train_tokens: what both
    are trained on, for the scaling law. tokens: size of the fine-tuning set, if there is one.
    dense_precision: None for the same formats as the MoE's. A model without experts is only made
    to fit. Raises E208 for numbers out of range.
    """
    if not shape.moe_layers:
        return _of_dense(shape, need)
    facts = facts_of(
        shape,
        dense,
        need,
        train_tokens=train_tokens,
        tokens=tokens,
        dense_precision=dense_precision,
    )
    reasons = [reason for rule in RULES if (reason := rule(facts))]
    deciding = [reason for reason in reasons if reason.decides]
    others = [reason for reason in reasons if not reason.decides]
    choice: Choice = "dense" if deciding else "MoE" if facts.fits else "make it fit"
    if deciding:
        summary = _stay_dense(facts, deciding[0])
    elif facts.fits:
        summary = _take_it(facts)
    else:
        summary = _make_it_fit(facts.ways, need, facts.held)
    others.sort(key=lambda reason: (reason.side == "dense") != (choice == "dense"))
    said = tuple(f"for {reason.side}: {reason.text}" for reason in deciding + others)
    return Verdict(choice=choice, summary=summary, reasons=said, options=facts.ways)


def facts_of(
    shape: Shape,
    dense: Shape | None,
    need: Need,
    *,
    train_tokens: float,
    tokens: float | None = None,
    dense_precision: Precision | None = None,
) -> Facts:
    """All that the rules look at. The arguments are those of `advise`."""
    held = asked(shape, need)  # first, as it refuses what cannot be
    require("fine-tuning tokens", 1 if tokens is None else tokens, 1)
    stored = dense_precision or {**need.precision, "dense layers": need.precision["experts"]}
    law = scaling.estimate(shape, train_tokens)
    rated = dense and total(dense).total >= law.dense_equal_loss
    peer = dense if dense and rated else dense_of(shape, law.dense_equal_loss)
    named = dense or peer
    opponent = dense or replace(rival(shape, memory=True), name=_AS_LARGE)
    against = partial(
        race,
        shape,
        precision=need.precision,
        device=need.device,
        dense_precision=stored,
        context=need.context,
        kv_bits=need.kv_bits,
        gpus=need.gpus,
    )
    races = against(dense=opponent, batches=batches_with(need.batch))
    (peer_here,) = against(dense=peer, batches=[need.batch])
    enough = fewest_gpus(shape, need)
    few = min(enough or need.gpus, need.gpus)
    (peer_at_one,) = against(dense=peer, batches=[1], gpus=few)
    theirs = replace(need, precision=stored)
    peer_ways = options(peer, theirs)
    return Facts(
        shape=shape,
        need=need,
        tokens=tokens,
        held=held,
        enough=enough,
        ways=options(shape, need),
        tax=routing(shape, need),
        worth=law.dense_equal_loss,
        extrapolated=bool(law.beyond),
        dense=opponent,
        given=dense is not None,
        here=next(each for each in races if each.batch == need.batch),
        at_one=races[0],
        fades=fades_at(races),
        peer=peer,
        peer_here=peer_here,
        peer_at_one=peer_at_one,
        peer_ways=peer_ways,
        named=named,
        named_held=asked(named, theirs),
        named_enough=fewest_gpus(named, theirs),
        named_ways=peer_ways if named is peer else options(named, theirs),
    )


def routing(shape: Shape, need: Need) -> float:
    """The share of a decode step that routing takes there; see `speed.routing_tax`."""
    return routing_tax(
        shape,
        need.precision,
        need.device,
        batch=need.batch,
        context=need.context,
        kv_bits=need.kv_bits,
        gpus=need.gpus,
    )


def dense_of(shape: Shape, parameters: float) -> Shape:
    """The dense model of the same make with about so many parameters.

    Its feed-forward networks lie between those of equal compute and of equal memory.
    """
    small, large = rival(shape, memory=False), rival(shape, memory=True)
    least, most = total(small).total, total(large).total
    share = min(max((parameters - least) / max(most - least, 1), 0.0), 1.0)
    mix = partial(_between, share=share)
    made = replace(
        small,
        layers=tuple(map(mix, small.layers, large.layers)),
        encoder=tuple(map(mix, small.encoder, large.encoder)),
    )
    return replace(made, name=f"a dense model of {billions(total(made).total)}")


def _between(small: Layer, large: Layer, share: float) -> Layer:
    low, high = small.feed_forward, large.feed_forward
    made = replace(
        low,
        dense=round(low.dense + share * (high.dense - low.dense)),
        width=round(low.width + share * (high.width - low.width)),
    )
    return replace(small, feed_forward=made)


def _of_dense(shape: Shape, need: Need) -> Verdict:
    held, ways = asked(shape, need), options(shape, need)
    size = gb(held.total.resident)
    if held.total.resident <= need.room:
        summary = f"{shape.name} has no experts and takes {size} of {place(need)}"
        return Verdict(choice="dense", summary=summary, reasons=(), options=ways)
    summary = _make_it_fit(ways, need, held)
    return Verdict(choice="make it fit", summary=summary, reasons=(), options=ways)


def _take_it(facts: Facts) -> str:
    size = f"it takes {gb(facts.held.total.resident)} of {place(facts.need)}"
    speed = number(facts.here.moe.tokens_per_second)
    if facts.here.ratio >= LEAD:
        times = f"{facts.here.ratio:.2g} times those of {facts.dense.name}"
        return f"Choose the MoE: {size} and makes {speed} tokens/s, {times}"
    but = f"at batch {facts.need.batch} it is no faster than {facts.dense.name}"
    at_one = f", at batch 1 {facts.at_one.ratio:.2g} times as fast" if facts.need.batch > 1 else ""
    worth = f"by the scaling law it is as good as a dense model of {billions(facts.worth)}"
    return f"Choose the MoE, though not for speed: {size}; {but}{at_one}; {worth}"


def _stay_dense(facts: Facts, reason: Reason) -> str:
    ways = usable(facts.named_ways, facts.need)
    if ways:
        return f"Stay dense: {reason.text}; {facts.named.name} fits with {ways[0].what}"
    most = _KEPT * facts.need.room * 8 / sum(FORMATS["int4"][1:])
    room = f"{facts.named.name} does not fit either, up to about {billions(most)} would at 4 bits"
    return f"Stay dense: {reason.text}; {room}"


def _make_it_fit(ways: tuple[Option, ...], need: Need, held: Memory) -> str:
    took = f"Make it fit: as asked it takes {gb(held.total.resident)} of {place(need)}"
    here = usable(ways, need)
    if not here:
        way = f"{ways[0].what} hold it" if ways else f"{MOST_GPUS:,} do not hold it either"
        return f"{took}; {way}"
    best, quick = here[0], max(here, key=lambda way: way.tokens_per_second)
    found = f"{took}; {_said(best)}"
    return found if quick is best else f"{found}, or, faster, {_said(quick)}"


def _said(way: Option) -> str:
    lost = f"{way.quality:.2g} points ({way.known})" if way.quality else "nothing"
    return f"{way.what} loses {lost} and makes {number(way.tokens_per_second)} tokens/s"
