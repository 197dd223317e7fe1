"""What `expertly plan` does beside planning: list what fits, and measure."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from expertly.cli.options import number, print_json, table
from expertly.cli.plan_page import device_name, size, speed
from expertly.plan.shape import Shape

if TYPE_CHECKING:
    from expertly.bench.measured import Measurement


def print_fits(asked: Mapping[str, Any], json: bool) -> None:
    """The built-in models that fit, fastest first."""
    from expertly.cli.plan_question import device_for
    from expertly.plan.fits import fits
    from expertly.plan.known import known, shape_of

    device = device_for({**asked, "memory": asked["fit"]})
    found = fits(
        [shape_of(name) for name in known()],
        device.memory,
        device,
        context=asked["context"] or 4096,
        kv_bits=asked["kv_bits"],
    )
    if json:
        print_json({"device": device.name, "memory_bytes": device.memory, "fits": map_all(found)})
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
            f"{each.quality:.1f}",
        ]
        for each in found
    ]
    where = device_name({"device": device.name, "memory_bytes": device.memory})
    typer.echo(f"what fits into one {where}, batch 1\n{table(rows)}")


def map_all(records: Any) -> list[dict[str, Any]]:
    """Records as JSON has them."""
    return [
        asdict(each) if hasattr(each, "__dataclass_fields__") else each._asdict()
        for each in records
    ]


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
        memory=bytes_of(asked["memory"], "--memory") if asked["memory"] else None,
        tell=lambda line: typer.echo(line, err=True),
    )


def measured_page(found: "Measurement") -> str:
    """Its tables, and what to know about them."""
    from expertly.bench.measured import tables

    shown = [f"{each.title}\n{table(each.rows)}" for each in tables(found)]
    return "\n\n".join([*shown, *(f"! {note}" for note in found.notes)])
