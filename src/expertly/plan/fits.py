"""Which models fit into a memory, and in which format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from expertly.plan.hardware import Device
from expertly.plan.memory import serving
from expertly.plan.options import LAYOUTS
from expertly.plan.precision import name_of, precision
from expertly.plan.quality import quality
from expertly.plan.shape import Shape, total
from expertly.plan.speed import decode


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model in the best format in which it fits."""

    name: str
    precision: str
    flags: str  # that ask for it: "--bits 4"
    resident: float  # bytes: weights, the KV cache of one sequence and activations
    total: int  # parameters
    active: int  # of them per token
    tokens_per_second: float  # of one sequence, by the roofline
    quality: float  # points of a zero-shot mean that are expected to be lost
    known: str  # how: "measured", "assumed", "nothing lost"


def fits(
    shapes: Iterable[Shape],
    memory: float,
    device: Device,
    *,
    context: int = 4096,
    kv_bits: float = 16,
) -> list[Fit]:
    """The models that fit into so many bytes of one device, the fastest first.

    Each in its checkpoint's own format if that fits, else in fewer bits (options.LAYOUTS). Raises
    E208 for a context or kv_bits out of range.
    """
    found = (next(_in_formats(shape, memory, device, context, kv_bits), None) for shape in shapes)
    return sorted(filter(None, found), key=lambda fit: -fit.tokens_per_second)


def _in_formats(
    shape: Shape, memory: float, device: Device, context: int, kv_bits: float
) -> Iterator[Fit]:
    """The formats in which it fits, the best first."""
    count = total(shape)
    for bits in (None, *LAYOUTS):
        stored = precision(shape, None, bits)
        held = serving(shape, stored, context=context, kv_bits=kv_bits).total.resident
        if held > memory:
            continue
        step = decode(shape, stored, device, context=context, kv_bits=kv_bits)
        lost = quality(shape, stored, kv_bits)
        yield Fit(
            name=shape.name,
            precision=name_of(stored, shape),
            flags=f"--bits {bits}" if bits else "",
            resident=held,
            total=count.total,
            active=count.active,
            tokens_per_second=step.tokens_per_second,
            quality=lost.points,
            known=lost.known,
        )
