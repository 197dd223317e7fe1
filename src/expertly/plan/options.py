"""Ways to make a model fit: fewer bits, a smaller KV cache, experts in RAM, more or fewer GPUs.

Bytes are those of all GPUs together, as memory.serving counts them. No room is kept for a driver:
cards have up to 7 % more bytes than the GB that their data sheets and this plan count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from expertly.plan.hardware import MACHINE, Device, between
from expertly.plan.memory import Memory, require, serving
from expertly.plan.precision import QUANTISABLE, Precision, name_of, precision, weights
from expertly.plan.quality import quality
from expertly.plan.shape import Shape
from expertly.plan.speed import decode
from expertly.plan.traffic import offload
from expertly.plan.units import gb

LAYOUTS = ("8", "4", "3,attention=4", "2.5,attention=4")  # as --bits says them
_KV_BITS = (8, 4)
_SAVES = 0.97  # fewer bits must leave less than this share of the weights' bytes
MOST_GPUS = 4096
_GPUS = tuple(2**power for power in range(13))  # that tensor parallelism can divide heads among
_DISKS = ("nvme", "sata")
_RAM = 4  # times the GPUs' memory: what is assumed of their machine
_DEAR = 2.0  # points; to lose so many more for speed alone is no option
_FASTER = 1.25  # what costs more quality, or more GPUs, must be at least so many times faster


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a model has to run on, and how."""

    device: Device
    precision: Precision
    gpus: int = 1
    gpus_said: bool = True  # False: the plan chose them, and may choose others
    context: int = 4096
    batch: int = 1
    kv_bits: float = 16
    ram: float | None = None  # bytes for offloaded experts; None: 4 times the GPUs' memory
    hit_rate: float | None = None  # of requests for experts; None: the share on the GPUs
    imbalance: float = 1.0  # tokens of the fullest expert rank over the mean

    @property
    def room(self) -> float:
        """Bytes of all GPUs together."""
        return self.device.memory * self.gpus


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run a model."""

    what: str  # in words: "int4, KV cache 8 bits"
    flags: str  # that ask for it, after those already said: "--bits 4 --kv-bits 8"
    fits: bool  # on the GPUs at hand
    resident: float  # bytes on all of its GPUs together
    gpus: int
    tokens_per_second: float  # of all sequences together, by the roofline; loads are not hidden
    quality: float  # points of a zero-shot mean that are expected to be lost
    known: str  # how the loss is known: "measured", "assumed", "nothing lost"
    offloaded: float = 0.0  # share of the routed experts that is not on a GPU


class _Layout(NamedTuple):
    need: Need  # with its formats
    flags: tuple[str, ...]
    held: Memory


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
    require("--memory", need.device.memory, 1)
    require("--hit-rate", need.hit_rate or 0.0, 0, 1)
    return serving(
        shape,
        need.precision,
        context=need.context,
        batch=need.batch,
        kv_bits=need.kv_bits,
        gpus=need.gpus,
        imbalance=need.imbalance,
    )


def fewest_gpus(shape: Shape, need: Need) -> int | None:
    """How many GPUs hold it: a power of two, or as many as there are; None if 4,096 do not."""
    several = (replace(need, gpus=gpus) for gpus in sorted({*_GPUS, need.gpus}))
    return next((each.gpus for each in several if _fits(asked(shape, each), each)), None)


def cached(shape: Shape, need: Need) -> float:
    """The share of its routed experts that find room on the GPUs beside all the rest."""
    experts = weights(shape, need.precision)["experts"].resident
    away = asked(shape, need).total.resident - need.room
    return min(max(1 - away / experts, 0.0), 1.0)


def ram(need: Need) -> float:
    """Bytes that offloaded experts may take; a disk sets no limit."""
    if need.device.host_link.name in _DISKS:
        return inf
    return _RAM * need.room if need.ram is None else need.ram


def smallest(shape: Shape, need: Need) -> float:
    """Bytes of the model at the fewest bits that are advised, on all GPUs together."""
    return min(layout.held.total.resident for layout in _layouts(shape, need))


def stays(shape: Shape, need: Need) -> float:
    """Bytes on the GPUs at these bits with all experts elsewhere but those at work."""
    return min(_least_here(shape, layout) for layout in _layouts(shape, need))


def _fits(held: Memory, need: Need) -> bool:
    return held.total.resident <= need.room


def _rank(option: Option, need: Need) -> tuple[bool, float, float]:
    return option.gpus > need.gpus, option.quality, -option.tokens_per_second


def _beats(other: Option, option: Option) -> bool:
    if other.gpus > option.gpus or other.quality > option.quality:
        return False
    much_better = not other.offloaded and other.quality <= option.quality - _DEAR
    return much_better or other.tokens_per_second * _FASTER >= option.tokens_per_second


def _all(shape: Shape, need: Need) -> Iterator[Option]:
    for layout in _layouts(shape, need):
        caches = (need.kv_bits, *(bits for bits in _KV_BITS if bits < need.kv_bits))
        ways = (replace(layout.need, kv_bits=bits) for bits in caches)
        here = next((way for way in ways if _fits(asked(shape, way), way)), None)
        if here is not None:
            yield _on_gpus(shape, need, here, layout.flags)
        if here is None or here.kv_bits != need.kv_bits:
            yield from _offloaded(shape, layout)
        gpus = fewest_gpus(shape, layout.need)
        if gpus is not None and gpus != need.gpus:
            yield _on_gpus(shape, need, replace(layout.need, gpus=gpus), layout.flags)


def _layouts(shape: Shape, need: Need) -> Iterator[_Layout]:
    """The formats that are asked for, then those of fewer bits that save bytes."""
    first = _Layout(need, (), asked(shape, need))
    yield first
    for bits in LAYOUTS:
        fewer = precision(shape, None, bits)
        lower = replace(
            need, precision={**need.precision, **{part: fewer[part] for part in QUANTISABLE}}
        )
        held = asked(shape, lower)
        if held.weights.resident < _SAVES * first.held.weights.resident:
            yield _Layout(lower, ("--bits", bits), held)


def _on_gpus(shape: Shape, need: Need, way: Need, layout: tuple[str, ...]) -> Option:
    """All of it on GPUs. way: the need with the formats and GPUs of this option."""
    words, flags = [name_of(way.precision, shape)], [*layout]
    if way.kv_bits != need.kv_bits:
        words.append(f"KV cache {way.kv_bits:g} bits")
        flags += ["--kv-bits", f"{way.kv_bits:g}"]
    if way.gpus != need.gpus:
        words.append(_gpus(way))
    if way.gpus != need.gpus or (flags and not need.gpus_said):
        flags += ["--gpus", f"{way.gpus}"]
    step = decode(
        shape,
        way.precision,
        way.device,
        batch=way.batch,
        context=way.context,
        kv_bits=way.kv_bits,
        gpus=way.gpus,
    )
    lost = quality(shape, way.precision, way.kv_bits)
    return Option(
        what=", ".join(words),
        flags=" ".join(flags),
        fits=way.gpus <= need.gpus,
        resident=asked(shape, way).total.resident,
        gpus=way.gpus,
        tokens_per_second=step.tokens_per_second,
        quality=lost.points,
        known=lost.known,
    )


def _gpus(way: Need) -> str:
    far = f" over {between(way.device, way.gpus).name}" if way.gpus > MACHINE else ""
    return f"{way.gpus:,} GPU" + "s" * (way.gpus > 1) + far


def _offloaded(shape: Shape, layout: _Layout) -> Iterator[Option]:
    """With the experts that find no room on the other side of the host's link; or nothing."""
    need = layout.need
    away = layout.held.total.resident - need.room
    experts = weights(shape, need.precision, need.batch).get("experts")
    if experts is None or away > ram(need):
        return
    if _least_here(shape, layout) > need.room:
        return
    share, link = away / experts.resident, need.device.host_link.name
    loading = offload(
        shape,
        need.precision,
        need.device,
        hit_rate=1 - share if need.hit_rate is None else need.hit_rate,
        batch=need.batch,
        context=need.context,
        kv_bits=need.kv_bits,
        gpus=need.gpus,
    )
    lost = quality(shape, need.precision, need.kv_bits)
    words = f"{share:.0%} of the experts ({gb(away)}) over {link}"
    flags = [*layout.flags, "--offload", link]
    if not need.gpus_said:
        flags += ["--gpus", f"{need.gpus}"]
    yield Option(
        what=f"{name_of(need.precision, shape)}, {words}",
        flags=" ".join(flags),
        fits=True,
        resident=need.room,
        gpus=need.gpus,
        tokens_per_second=loading.slow,
        quality=lost.points,
        known=lost.known,
        offloaded=share,
    )


def _least_here(shape: Shape, layout: _Layout) -> float:
    """Bytes that no offload takes off the GPUs: all but the experts, and those of one layer."""
    total, need = layout.held.total.resident, layout.need
    experts = weights(shape, need.precision, need.batch).get("experts")
    if experts is None:
        return total
    return total - experts.resident + experts.touched / len(shape.moe_layers)
