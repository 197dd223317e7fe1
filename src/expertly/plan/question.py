"""What a plan is asked: a model, what it runs on and how, and what it is compared with."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from expertly.plan.advice import Need
from expertly.plan.hardware import Device, Link
from expertly.plan.memory import Memory, serving
from expertly.plan.precision import Precision, weights
from expertly.plan.shape import Shape, rival, total
from expertly.plan.training import Layout, training

MOST_GPUS = 4096
_TOKENS_PER_ACTIVE = 20  # where nothing says how many a model is trained on (Chinchilla)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model on some GPUs; what is None is left to the plan."""

    shape: Shape
    precision: Precision
    against: Shape | None = None
    against_precision: Precision | None = None
    device: Device
    memory: float  # bytes of one GPU that may be used
    gpus: int | None = None  # None: as many as it takes
    links: tuple[Link, ...]  # between GPUs; the first joins those of one machine
    context: int = 4096
    batch: int = 1
    kv_bits: float = 16
    imbalance: float = 1.0  # the load of the fullest rank of experts over the mean
    offload: Link | None = None
    hit_rate: float | None = None
    layout: Layout | None = None
    method: str = "full"
    checkpointing: bool = True
    train_tokens: float | None = None
    tuning_tokens: float | None = None
    utilisation: float | None = None
    gpu_hours: float | None = None
    price: float | None = None


def served(question: Question) -> Memory:
    """What serving it takes, on all GPUs together."""
    return serving(
        question.shape,
        question.precision,
        context=question.context,
        batch=question.batch,
        kv_bits=question.kv_bits,
        imbalance=question.imbalance,
    )


def gpus_needed(question: Question) -> int:
    """How many of the devices share the weights and the cache, each beside its activations."""
    held = served(question)
    each = question.memory - held.activations.resident - held.dispatch.resident
    shared = held.weights.resident + held.kv_cache.resident
    return ceil(shared / each) if each > shared / MOST_GPUS else MOST_GPUS


def gpus_to_train(question: Question, shape: Shape, method: str) -> int | None:
    """How many devices, fully sharded, train it on a sequence each; None: more than 4,096."""
    gpus = 1
    while gpus <= MOST_GPUS:
        held = training(shape, layout=Layout(fsdp=gpus), method=method, context=question.context)
        if held.total <= question.memory:
            return gpus
        gpus *= 2
    return None


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


def cached_share(question: Question) -> float:
    """The share of the experts that fit beside all the rest: how often even routing hits them."""
    experts = weights(question.shape, question.precision)["experts"].resident
    rest = served(question).total.resident - experts
    return min(max((question.memory * (question.gpus or 1) - rest) / experts, 0.0), 1.0)


def tokens_of(question: Question) -> float:
    """How many tokens it is trained on: as asked, or 20 for every active parameter."""
    return question.train_tokens or _TOKENS_PER_ACTIVE * total(question.shape).active


def need(question: Question, gpus: int) -> Need:
    """What the advice has to make it fit into."""
    return Need(
        device=question.device,
        precision=question.precision,
        memory=question.memory,
        gpus=gpus,
        context=question.context,
        batch=question.batch,
        kv_bits=question.kv_bits,
        hit_rate=question.hit_rate,
        link=question.links[0],
        offload=question.offload,
    )
