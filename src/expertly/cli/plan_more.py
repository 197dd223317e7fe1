"""What `expertly plan` does beside planning: list what fits, and measure."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from expertly.cli.options import number, print_json, table
from expertly.cli.plan_page import device_name, size, speed
from expertly.errors import ExpertlyError
from expertly.plan.shape import Shape

if TYPE_CHECKING:
    from expertly.bench.measured import Measurement


# the flags that mean something beside --fit
_BESIDE = ("fit", "gpu", "hardware", "context", "kv_bits")


def print_fits(asked: Mapping[str, Any], given: Iterable[str], json: bool) -> None:
    """The built-in models that fit, fastest first.

    given: the names of the flags that were written; E208 for one that would do nothing.
    """
    from expertly.cli.plan_question import device_for
    from expertly.plan.fits import fits
    from expertly.plan.known import known, shape_of

    for name in given:
        if name not in _BESIDE:
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise ExpertlyError("E208", flag, "does nothing beside --fit", fix=f"leave out {flag}")
    device = device_for(asked)
    shapes = [shape_of(name) for name in known()]
    context = 4096 if asked["context"] is None else asked["context"]
    found = fits(shapes, device.memory, device, context=context, kv_bits=asked["kv_bits"])
    if json:
        held = {"device": device.name, "memory_bytes": device.memory}
        print_json({**held, "fits": [asdict(each) for each in found]})
        return
    rows = [["model", "format", "memory", "parameters", "used per token", "tok/s", "points lost"]]
    rows += [
        [
            each.name,
            each.precision,
            size(each.resident),
            number(each.total),
            number(each.active),
            speed(each.tokens_per_second),
            f"{each.quality:.1f} {each.known}" if each.quality else "0",
        ]
        for each in found
    ]
    where = device_name({"device": device.name, "memory_bytes": device.memory})
    typer.echo(f"what fits into one {where}, one sequence of {context:,} tokens\n{table(rows)}")


def require_packed(bits: str | None) -> None:
    """Raises E208 for bits that weights are not packed to when they are measured."""
    from expertly.bench.expected import packing_of

    packing_of(bits)


def measured(model: str, shape: Shape, asked: Mapping[str, Any]) -> "Measurement":
    """What this machine does with the model, beside what was predicted of it."""
    from expertly.bench.measure import measure
    from expertly.plan.known import config_of
    from expertly.plan.units import bytes_of

    return measure(
        Path(model),
        config_of(model)[1],
        shape,
        dtype=asked["dtype"],
        bits=asked["bits"],
        memory=bytes_of(asked["memory"], "--memory") if asked["memory"] else None,
        tell=lambda line: typer.echo(line, err=True),
    )


def measured_page(found: "Measurement") -> str:
    """Its tables, and what to know about them."""
    from expertly.bench.measured import tables

    shown = [f"{each.title}\n{table(each.rows)}" for each in tables(found)]
    return "\n\n".join([*shown, "\n".join(f"! {note}" for note in found.notes)])
