"""The part of a plan about training: GPUs, bytes on each, all-to-all between them, and cost."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import gcd
from typing import Any

from expertly.plan.cost import training_cost
from expertly.plan.hardware import MACHINE, Link, between
from expertly.plan.options import MOST_GPUS
from expertly.plan.question import Question, tokens_of, uneven
from expertly.plan.shape import Shape
from expertly.plan.traffic import all_to_all
from expertly.plan.training import IMBALANCE, Least, Training, least_gpus, training, training_flops

Answer = dict[str, Any]


def training_gpus(question: Question, shape: Shape, method: str) -> Answer:
    """How many GPUs train it, or what is too large on each of 4,096."""
    least = _least(question, shape, method)
    largest = {"part": least.largest, "bytes": getattr(least.held, least.largest)}
    return {
        "gpus": least.layout.world if least.fits else None,
        "ep": least.layout.ep,
        "per_gpu_bytes": least.held.total,
        "largest": None if least.fits else largest,
    }


def training_memory(question: Question) -> Answer:
    """Bytes on each GPU to train it, by what they are for."""
    shape, method = question.shape, question.method
    layout = question.layout or _least(question, shape, method).layout
    held = _trained(question, shape, method)(layout=layout)
    return {
        "asked": question.layout is not None or question.method != "full",
        "method": question.method,
        "layout": layout._asdict(),
        "per_gpu": asdict(held) | {"total": held.total},
        "fits": held.total <= question.memory,
    }


def costs(question: Question) -> Answer:
    """Training FLOPs, hours, money and energy."""
    flops = training_flops(question.shape, tokens_of(question), context=question.context)
    found = training_cost(
        flops,
        question.device,
        utilisation=question.utilisation,
        gpu_hours=question.gpu_hours,
        price=question.price,
    )
    return {"tokens": tokens_of(question), **asdict(found)}


def traffic(question: Question, gpus: int) -> list[Answer]:
    """All-to-all with experts spread over ranks, for every kind of link that joins so many.

    Of a training step of `batch` sequences on each rank, and of a decode step of a token of each.
    """
    moes = question.shape.moe_layers
    if not moes:
        return []
    asked = question.layout.ep if question.layout else 1
    asked = asked if asked > 1 else (gpus if gpus > 1 else MACHINE)
    experts = gcd(*(layer.feed_forward.experts for layer in moes))
    ranks = max(rank for rank in range(1, min(asked, experts) + 1) if experts % rank == 0)
    joined = between(question.device, ranks)
    links = dict.fromkeys((joined, *question.links[1:]))
    return [_sent(question, link, ranks) for link in links]


def _sent(question: Question, link: Link, ranks: int) -> Answer:
    shape, tokens = question.shape, question.batch * question.context
    flops = training_flops(shape, tokens, context=question.context)
    utilisation = costs(question)["utilisation"]
    compute = training_cost(flops, question.device, utilisation=utilisation).gpu_hours * 3600
    trains = all_to_all(
        shape,
        link,
        ranks=ranks,
        tokens=tokens,
        backward=True,
        imbalance=uneven(question, IMBALANCE),
    )
    decodes = all_to_all(
        shape.decoder, link, ranks=ranks, tokens=question.batch, imbalance=uneven(question, 1.0)
    )
    return {
        "link": link.name,
        "ranks": ranks,
        "bytes_per_token_layer": trains.bytes_per_token_layer,
        "training_seconds": trains.seconds,
        "training_share": trains.seconds / (trains.seconds + compute),
        "decode_seconds": decodes.seconds,
    }


def _trained(question: Question, shape: Shape, method: str) -> Callable[..., Training]:
    """What training it takes on each GPU, once `layout` is said."""
    return partial(
        training,
        shape,
        method=method,
        rank=question.rank,
        mixed=question.mixed,
        checkpointing=question.checkpointing,
        batch=question.batch,
        context=question.context,
        imbalance=uneven(question, IMBALANCE),
    )


def _least(question: Question, shape: Shape, method: str) -> Least:
    """The fewest devices that train it, `batch` sequences on each."""
    return least_gpus(shape, question.memory, _trained(question, shape, method), MOST_GPUS)
