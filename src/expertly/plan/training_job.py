"""The part of a plan about training: GPUs, bytes on each, seconds of a step, traffic, cost."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import gcd
from typing import Any

from expertly.errors import ExpertlyError
from expertly.plan.cost import training_cost
from expertly.plan.hardware import MACHINE, Link, between
from expertly.plan.options import MOST_GPUS
from expertly.plan.question import Question, tokens_of, uneven
from expertly.plan.shape import Shape
from expertly.plan.traffic import all_to_all
from expertly.plan.training import (
    IMBALANCE,
    Layout,
    Least,
    Training,
    best_layout,
    least_gpus,
    training,
    training_flops,
)
from expertly.plan.training_speed import TrainingStep, training_step

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


def training_of(question: Question) -> Answer:
    """Training it: bytes on each GPU by what they are for, and the seconds of a step.

    Raises E208 for a layout that is not of as many GPUs as are said.
    """
    layout = _layout(question)
    held = _trained(question, question.shape, question.method)(layout=layout)
    step = _step(question, layout)
    return {
        "asked": _asked(question),
        "method": question.method,
        "layout": layout._asdict(),
        "batch": question.train_batch or 1,
        "per_gpu": asdict(held) | {"total": held.total},
        "fits": held.total <= question.device.memory,
        "tokens_per_second": step.tokens_per_second,
        "step_seconds": step.seconds,
        "by_part": step.by_part,
        "utilisation": costs(question)["utilisation"],
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

    Of a training step, and of a decode step of `batch` tokens in all, at least one on a rank.
    """
    moes = question.shape.moe_layers
    if not moes:
        return []
    layout = _layout(question) if _asked(question) else Layout()
    if layout.ep == 1:
        experts, most = gcd(*(layer.feed_forward.experts for layer in moes)), gpus
        most = min(most if most > 1 else MACHINE, experts)
        ranks = max(rank for rank in range(1, most + 1) if experts % rank == 0)
        layout = Layout(fsdp=ranks, ep=ranks)
    step = _step(question, layout)
    beside = step.seconds - step.by_part["all_to_all"]
    links = dict.fromkeys((between(question.device, layout.ep), *question.networks))
    return [_sent(question, link, layout, beside) for link in links]


def _sent(question: Question, link: Link, layout: Layout, beside: float) -> Answer:
    """A row for one link. beside: seconds of a training step without all-to-all."""
    tokens, ranks = (question.train_batch or 1) * question.context / layout.tp, layout.ep
    trains = all_to_all(
        question.shape,
        link,
        ranks=ranks,
        tokens=tokens,
        passes=3 if question.checkpointing else 2,
        imbalance=uneven(question, IMBALANCE),
    )
    decodes = all_to_all(
        question.shape.decoder,
        link,
        ranks=ranks,
        tokens=max(question.batch / ranks, 1),
        imbalance=uneven(question, 1.0),
    )
    return {
        "link": link.name,
        "ranks": ranks,
        "bytes_per_token_layer": trains.bytes_per_token_layer,
        "training_seconds": trains.seconds,
        "training_share": trains.seconds / (trains.seconds + beside),
        "decode_seconds": decodes.seconds,
    }


def _asked(question: Question) -> bool:
    """Whether anything is asked of training."""
    said = question.layout is not None or question.train_batch is not None
    return said or question.method != "full"


def _layout(question: Question) -> Layout:
    """As asked for; else of the GPUs that are there, if training is asked for; else the fewest.

    Raises E208 for a layout that is not of as many GPUs as are said.
    """
    shape, layout, gpus = question.shape, question.layout, question.gpus
    if layout and gpus and layout.world != gpus:
        why = f"is {gpus}, but --fsdp {layout.fsdp} x --tp {layout.tp} are {layout.world} GPUs"
        raise ExpertlyError("E208", "--gpus", why, fix="leave out --gpus, or correct --fsdp")
    if layout:
        return layout
    if gpus and _asked(question):
        trained = _trained(question, shape, question.method)
        return best_layout(shape, question.device.memory, trained, gpus).layout
    return _least(question, shape, question.method).layout


def _step(question: Question, layout: Layout) -> TrainingStep:
    """A training step, at the utilisation of the cost."""
    return training_step(
        question.shape,
        question.device,
        layout=layout,
        utilisation=costs(question)["utilisation"],
        **_settings(question, question.method),
    )


def _trained(question: Question, shape: Shape, method: str) -> Callable[..., Training]:
    """What training it takes on each GPU, once `layout` is said."""
    return partial(training, shape, **_settings(question, method))


def _least(question: Question, shape: Shape, method: str) -> Least:
    """The fewest devices that train it, with as many sequences on each."""
    return least_gpus(shape, question.device.memory, _trained(question, shape, method), MOST_GPUS)


def _settings(question: Question, method: str) -> dict[str, Any]:
    """What is asked of training, by the names that `training` and `training_step` have for it."""
    return {
        "method": method,
        "rank": question.rank,
        "mixed": question.mixed,
        "checkpointing": question.checkpointing,
        "batch": question.train_batch or 1,
        "context": question.context,
        "imbalance": uneven(question, IMBALANCE),
    }
