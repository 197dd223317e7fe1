"""What a plan is asked: a model, what it runs on and how, and what it is compared with."""

from collections.abc import Iterator
from dataclasses import dataclass

from expertly.plan.hardware import Device, Link
from expertly.plan.options import Need
from expertly.plan.precision import Precision
from expertly.plan.shape import Shape, rival, total
from expertly.plan.training import Layout

_TOKENS_PER_ACTIVE = 20  # where nothing says how many a model is trained on (Chinchilla)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model on some GPUs; what is None is left to the plan."""

    shape: Shape
    precision: Precision
    against: Shape | None = None
    against_precision: Precision | None = None
    device: Device
    gpus: int | None = None  # None: as many as it takes
    networks: tuple[Link, ...] = ()  # between machines, to compare
    context: int = 4096
    batch: int = 1  # sequences served at a time, on all GPUs
    kv_bits: float = 16
    imbalance: float | None = None  # load of the fullest rank of experts over the mean
    offloaded: bool = False  # experts lie behind the device's host link
    hit_rate: float | None = None
    ram: float | None = None  # bytes for offloaded experts; None: 4 times the GPUs' memory
    layout: Layout | None = None
    train_batch: int | None = None  # sequences of a training step on each GPU; None: 1
    method: str = "full"
    rank: int = 16  # of adapters
    mixed: bool = True  # training in bf16 with an fp32 master copy
    checkpointing: bool = True
    train_tokens: float | None = None
    tuning_tokens: float | None = None
    utilisation: float | None = None
    gpu_hours: float | None = None
    price: float | None = None


def uneven(question: Question, usual: float) -> float:
    """The imbalance that is asked for, or what is usual."""
    return usual if question.imbalance is None else question.imbalance


def contenders(question: Question) -> Iterator[tuple[str, Shape, Precision]]:
    """The model, the dense ones of its make, and the one it is asked to be compared with."""
    shape, stored = question.shape, question.precision
    yield "model", shape, stored
    if shape.moe_layers:
        # where experts were, there are dense layers
        as_experts = {**stored, "dense layers": stored["experts"]}
        yield "equal compute", rival(shape, memory=False), as_experts
        yield "equal memory", rival(shape, memory=True), as_experts
    if question.against:
        yield "vs", question.against, question.against_precision or stored


def tokens_of(question: Question) -> float:
    """How many tokens it is trained on: as asked, or 20 for every active parameter."""
    return question.train_tokens or _TOKENS_PER_ACTIVE * total(question.shape).active


def need(question: Question, gpus: int) -> Need:
    """What the advice has to make it fit into."""
    return Need(
        device=question.device,
        precision=question.precision,
        gpus=gpus,
        gpus_said=question.gpus is not None,
        context=question.context,
        batch=question.batch,
        kv_bits=question.kv_bits,
        hit_rate=question.hit_rate,
        ram=question.ram,
        imbalance=uneven(question, 1.0),
    )
