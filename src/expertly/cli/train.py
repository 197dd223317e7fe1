"""expertly train: parse the config, train, say how it ended."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from expertly.cli.options import Json, command, print_json


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in optim.learning_rate=1e-3")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where it stopped.")
    ] = False,
    json: Json = False,
) -> None:
    """Train an MoE or a dense model on text, from scratch or from a checkpoint.

    Example: expertly train examples/moe.yaml schedule.max_steps=200 output_dir=runs/first
    """
    from expertly.config import load
    from expertly.train.config import TrainConfig
    from expertly.train.loop import run

    try:
        result = run(load(TrainConfig, config, overrides or []), resume=resume)
    except KeyboardInterrupt:
        typer.echo("expertly: --resume goes on from the newest checkpoint", err=True)
        raise
    if json:
        print_json(asdict(result))
        return
    typer.echo(
        f"held-out loss {result.loss:.4f} after {result.steps} steps, {result.tokens:,} tokens"
    )
    typer.echo(f"checkpoint    {result.checkpoint}")
    typer.echo(f"try it        {command()} generate {result.checkpoint} --prompt 'def main('")
