"""expertly compare: which of two runs reaches a loss sooner, in steps and in seconds."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from expertly.train.compare import chart
    from expertly.train.compare import compare as race

    a, b, races = race(run_a, run_b, loss=loss)
    if json:
        ratios = [(each.step_ratio, each.time_ratio) for each in races]
        print_json(
            {
                "a": a._asdict(),
                "b": b._asdict(),
                "races": [
                    {**asdict(each), "step_ratio": steps, "time_ratio": seconds}
                    for each, (steps, seconds) in zip(races, ratios, strict=True)
                ],
            }
        )
        return
    typer.echo(chart([a, b]))
    typer.echo("")
    typer.echo(comparison(a, b, races))


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
    return f"{line}: {race.step_ratio:.2f}x fewer steps, {race.time_ratio:.2f}x less time"
