"""expertly merge: an adapter becomes part of its model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from expertly.cli.options import Json, command, print_json


def merge(
    adapter: Annotated[
        Path, typer.Argument(help="An adapter's folder, as a run's checkpoint.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="The model's folder.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(help="Its base.", show_default="the one that it names")
    ] = None,
    json: Json = False,
) -> None:
    """Fold an adapter into its base, and prove that the model answers as before.

    What is written is a stock model folder, which transformers, vLLM and llama.cpp's converter
    read. Example: expertly merge runs/chat/checkpoint-120 chat-model
    """
    from expertly.train.merge import MergeConfig, run

    config = MergeConfig(adapter=str(adapter), output_dir=str(output), base=str(base or ""))
    made = run(config, lambda line: typer.echo(line, err=True))
    if json:
        print_json(asdict(made))
        return
    parts = ", ".join(f"{part} {count}" for part, count in made.adapters.items() if count)
    typer.echo(f"merged        {parts} weights of {made.base}")
    typer.echo(
        f"logits        folded in {made.largest_logit_difference:.2g}, rounding "
        f"{made.rounding_logit_difference:.2g}, written {made.written_logit_difference:.2g}; the "
        f"largest is {made.largest_logit:.3g}"
    )
    typer.echo(f"folder        {made.folder}")
    typer.echo(f"talk to it    {command()} generate {made.folder} --chat")
