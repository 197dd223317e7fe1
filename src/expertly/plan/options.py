"""Ways to make a model fit: fewer bits, a smaller KV cache, experts in RAM, more or fewer GPUs.

A GPU of several holds its share of weights and KV cache, and all activations. No room is kept for
a driver: cards have up to 7 % more bytes than the GB that their data sheets and this plan count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from expertly.plan.hardware import Device, Link, links
from expertly.plan.memory import Memory, require, serving
from expertly.plan.precision import Bytes, Precision, name_of, precision, weights
from expertly.plan.quality import quality
from expertly.plan.shape import Shape
from expertly.plan.speed import decode
from expertly.plan.traffic import offload

LAYOUTS = ("8", "4", "3,attention=4", "2.5,attention=4")  # as --bits says them
_KV_BITS = (8, 4)
_SAVES = 0.97  # fewer bits must leave less than this share of the weights' bytes
_GPUS = (1, 2, 4, 8, 16, 32, 64)  # that tensor parallelism can divide heads among
_MACHINE = 8  # GPUs in one; more are joined by a network
_NETWORK = "infiniband-400"
_RAM = 4  # times the GPUs' memory: what is assumed of their machine
_DEAR = 2.0  # points; to lose so many more for speed alone is no option
_FASTER = 1.25  # what costs more quality, or more GPUs, must be at least so many times faster


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a model has to run on, and how."""

    memory: float  # bytes of one GPU that may be used
    device: Device
    precision: Precision
    gpus: int = 1
    context: int = 4096
    batch: int = 1
    kv_bits: float = 16
    ram: float | None = None  # bytes for offloaded experts; None: 4 times the GPUs' memory
    hit_rate: float | None = None  # of requests for experts; None: the share on the GPUs
    link: Link | None = None  # between GPUs of one machine; None: the device's own
    offload: Link | None = None  # to where experts are offloaded; None: the device's own


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run a model."""

    what: str  # in words: "int4, KV cache 8 bits"
    flags: str  # that ask for it: "--bits 4 --kv-bits 8"
    fits: bool  # on the GPUs at hand
    resident: float  # bytes on all of its GPUs together
    gpus: int
    tokens_per_second: float  # of all sequences together, by the roofline; loads are not hidden
    quality: float  # points of a zero-shot mean that are expected to be lost
    known: str  # how the loss is known: "measured", "assumed", "nothing lost"
    offloaded: float = 0.0  # share of the routed experts that is not on a GPU


class _Layout(NamedTuple):
    stored: Precision
    flags: tuple[str, ...]
    held: Memory  # with the KV cache as it is asked for


def options(shape: Shape, need: Need) -> tuple[Option, ...]:
    """Sensible ways to run a model: on the GPUs at hand first, then on more of them.

    Each ranked by quality loss, then speed. Left out, unless it is the model as asked for, is what
    another beats, which takes no more GPUs, loses no more quality and is about as fast. Raises
    E208 for numbers out of range.
    """
    kept: list[Option] = []
    for option in sorted(_all(shape, need), key=lambda option: _rank(option, need)):
        if not option.flags or not any(_beats(other, option) for other in kept):
            kept.append(option)
    return tuple(kept)


def asked(shape: Shape, need: Need) -> Memory:
    """Bytes of the model as it is asked for, on all GPUs together.

    Raises E208 for numbers out of range.
    """
    require("--gpus", need.gpus, 1)
    require("--memory", need.memory, 1)
    require("--hit-rate", need.hit_rate or 0.0, 0, 1)
    return _held(shape, need, need.precision)


def per_gpu(held: Memory, gpus: int) -> float:
    """Bytes of it that each of so many GPUs holds."""
    shared = held.weights.resident + held.kv_cache.resident
    return shared / gpus + held.activations.resident + held.dispatch.resident


def fewest_gpus(held: Memory, memory: float) -> int | None:
    """How many GPUs hold it at least, a power of two; None if 64 do not."""
    return next((gpus for gpus in _GPUS if per_gpu(held, gpus) <= memory), None)


def ram(need: Need) -> float:
    """Bytes that offloaded experts may take; a disk sets no limit."""
    if host_link(need).name in ("nvme", "sata"):
        return inf
    return _RAM * need.memory * need.gpus if need.ram is None else need.ram


def host_link(need: Need) -> Link:
    """Between a GPU and where offloaded experts lie."""
    return need.offload or links()[need.device.host_link]


def smallest(shape: Shape, need: Need) -> float:
    """Bytes of the model at the fewest bits that are advised, on all GPUs together."""
    return min(layout.held.total.resident for layout in _layouts(shape, need))


def _rank(option: Option, need: Need) -> tuple[bool, float, float]:
    return option.gpus > need.gpus, option.quality, -option.tokens_per_second


def _beats(other: Option, option: Option) -> bool:
    if other.gpus > option.gpus or other.quality > option.quality:
        return False
    much_better = not other.offloaded and other.quality <= option.quality - _DEAR
    return much_better or other.tokens_per_second * _FASTER >= option.tokens_per_second


def _all(shape: Shape, need: Need) -> Iterator[Option]:
    fewer = [bits for bits in _KV_BITS if bits < need.kv_bits]
    for layout in _layouts(shape, need):
        fitting = (
            bits
            for bits in (need.kv_bits, *fewer)
            if per_gpu(_cached(layout, need, bits), need.gpus) <= need.memory
        )
        here = next(fitting, None)
        if here is not None:
            yield _on_gpus(shape, need, layout, here, need.gpus)
        if here != need.kv_bits:
            yield from _offloaded(shape, need, layout)
        gpus = fewest_gpus(layout.held, need.memory)
        if gpus is not None and gpus != need.gpus:
            yield _on_gpus(shape, need, layout, need.kv_bits, gpus)


def _layouts(shape: Shape, need: Need) -> Iterator[_Layout]:
    """The formats that are asked for, then those of fewer bits that save bytes."""
    first = _Layout(need.precision, (), asked(shape, need))
    yield first
    for bits in LAYOUTS:
        stored = precision(shape, None, bits)
        held = _held(shape, need, stored)
        if held.weights.resident < _SAVES * first.held.weights.resident:
            yield _Layout(stored, ("--bits", bits), held)


def _held(shape: Shape, need: Need, stored: Precision) -> Memory:
    return serving(shape, stored, context=need.context, batch=need.batch, kv_bits=need.kv_bits)


def _cached(layout: _Layout, need: Need, kv_bits: float) -> Memory:
    """Its bytes with a KV cache of other bits."""
    sizes = (size * kv_bits / need.kv_bits for size in layout.held.kv_cache)
    return replace(layout.held, kv_cache=Bytes(*sizes))


def _on_gpus(shape: Shape, need: Need, layout: _Layout, kv_bits: float, gpus: int) -> Option:
    """All of it on GPUs."""
    words, flags = [name_of(layout.stored, shape)], [*layout.flags]
    if kv_bits != need.kv_bits:
        words.append(f"KV cache {kv_bits:g} bits")
        flags += ["--kv-bits", f"{kv_bits:g}"]
    far = gpus > _MACHINE
    if gpus != need.gpus:
        words.append(f"{gpus} GPU" + "s" * (gpus > 1) + f" over {_NETWORK}" * far)
        flags += ["--gpus", f"{gpus}"]
    step = decode(
        shape,
        layout.stored,
        need.device,
        batch=need.batch,
        context=need.context,
        kv_bits=kv_bits,
        gpus=gpus,
        link=links()[_NETWORK] if far else need.link,
    )
    lost = quality(shape, layout.stored, kv_bits)
    return Option(
        what=", ".join(words),
        flags=" ".join(flags),
        fits=gpus <= need.gpus,
        resident=per_gpu(_cached(layout, need, kv_bits), gpus) * gpus,
        gpus=gpus,
        tokens_per_second=step.tokens_per_second,
        quality=lost.points,
        known=lost.known,
    )


def _offloaded(shape: Shape, need: Need, layout: _Layout) -> Iterator[Option]:
    """With the experts that find no room on the other side of the host's link; or nothing."""
    away = (per_gpu(layout.held, need.gpus) - need.memory) * need.gpus
    experts = weights(shape, layout.stored, need.batch).get("experts")
    if experts is None or away > ram(need):
        return
    at_once = experts.touched / len(shape.moe_layers)  # those of one layer
    if away > experts.resident - at_once:
        return
    share = away / experts.resident
    hit_rate = 1 - share if need.hit_rate is None else need.hit_rate
    lost = quality(shape, layout.stored, need.kv_bits)
    words = f"{share:.0%} of the experts ({away / 1e9:.3g} GB) over {host_link(need).name}"
    yield Option(
        what=f"{name_of(layout.stored, shape)}, {words}",
        flags=" ".join([*layout.flags, "--offload", host_link(need).name]),
        fits=True,
        resident=need.memory * need.gpus,
        gpus=need.gpus,
        tokens_per_second=_loading_speed(shape, need, layout.stored, hit_rate),
        quality=lost.points,
        known=lost.known,
        offloaded=share,
    )


def _loading_speed(shape: Shape, need: Need, stored: Precision, hit_rate: float) -> float:
    """Tokens per second. Several GPUs share each load, every one over a link of its own."""
    device, link = need.device, host_link(need)
    together = replace(
        device,
        bandwidth=device.bandwidth * need.gpus,
        flops={name: rate * need.gpus for name, rate in device.flops.items()},
    )
    return offload(
        shape,
        stored,
        together,
        replace(link, bandwidth=link.bandwidth * need.gpus),
        hit_rate=hit_rate,
        batch=need.batch,
        context=need.context,
        kv_bits=need.kv_bits,
    ).slow
