"""expertly compare: which of two runs reaches a loss sooner, in steps and in seconds."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertly.cli.options import Json, print_json, table

if TYPE_CHECKING:
    from expertly.train.compare import Curve, Race


def compare(
    run_a: Annotated[Path, typer.Argument(help="Output folder of a run.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="Output folder of another.", show_default=False)],
    loss: Annotated[
        float | None, typer.Option(help="The loss to reach; default: each other's final one.")
    ] = None,
    json: Json = False,
) -> None:
    """Say at which step and which second each run reaches a held-out loss, and draw the curves.

    Example: expertly compare runs/demo/moe runs/demo/twin
    """
    from expertly.train.compare import chart, differences_of
    from expertly.train.compare import compare as race

    a, b, races = race(run_a, run_b, loss=loss)
    unequal = differences_of(run_a, run_b)
    if json:
        print_json({**as_json(a, b, races), "differences": unequal})
        return
    typer.echo(chart([a, b]))
    typer.echo("\n" + comparison(a, b, races))
    for difference in unequal:
        typer.echo(f"! {difference}")


def as_json(a: "Curve", b: "Curve", races: "list[Race]") -> dict[str, Any]:
    """The comparison for machines."""
    ratios = [{"step_ratio": race.step_ratio, "time_ratio": race.time_ratio} for race in races]
    both = [{**asdict(race), **ratio} for race, ratio in zip(races, ratios, strict=True)]
    return {"a": a._asdict(), "b": b._asdict(), "races": both}


def comparison(a: "Curve", b: "Curve", races: "list[Race]") -> str:
    """Both runs side by side, then who reached which loss when."""
    rows = [["", a.name, b.name]]
    rows += [
        [f"final loss, {domain}", f"{a.domains[domain]:.3f}", f"{b.domains[domain]:.3f}"]
        for domain in a.domains
        if domain in b.domains
    ]
    rows.append(["final loss, all", f"{a.losses[-1]:.3f}", f"{b.losses[-1]:.3f}"])
    rows.append(["tokens/s", f"{a.tokens_per_second:,.0f}", f"{b.tokens_per_second:,.0f}"])
    rows.append(["steps", f"{a.steps[-1]:,}", f"{b.steps[-1]:,}"])
    rows.append(["seconds of training", f"{a.seconds[-1]:.0f}", f"{b.seconds[-1]:.0f}"])
    return "\n".join([table(rows), "", *(_verdict(a, b, race) for race in races)])


def _verdict(a: "Curve", b: "Curve", race: "Race") -> str:
    def when(name: str, reached: "object") -> str:
        if reached is None:
            return f"{name} never"
        return f"{name} at step {reached.step:,.0f} ({reached.seconds:.0f} s)"  # type: ignore[attr-defined]

    line = f"loss {race.loss:.3f}: {when(a.name, race.a)}, {when(b.name, race.b)}"
    if race.step_ratio is None or race.time_ratio is None:
        return line
    steps = _winner(a, b, race.step_ratio, "fewer steps")
    return f"{line}; {steps}, {_winner(a, b, race.time_ratio, 'less time')}"


def _winner(a: "Curve", b: "Curve", ratio: float, what: str) -> str:
    """Who needs less and how many times; ratio: what B needs over what A needs."""
    name, times = (a.name, ratio) if ratio >= 1 else (b.name, 1 / ratio)
    return f"{name} needs {times:.2f}x {what}"
