"""expertly demo: train a small MoE and its dense twin on real text, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertly.cli.compare import as_json, comparison
from expertly.cli.options import Json, command, print_json, table

if TYPE_CHECKING:
    from expertly.train.loop import TrainResult

_PROMPTS = ("def __init__(self, ", "The function returns ")


def demo(
    folder: Annotated[Path, typer.Option(help="Where both runs go.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in schedule.max_steps=50")
    ] = None,
    json: Json = False,
) -> None:
    """Train a small MoE and its dense twin on the text every Python carries, and compare them.

    Stopped, it goes on from its newest checkpoint. Example: expertly demo --folder runs/demo
    """
    from expertly.train.compare import chart, compare

    moe, twin = folder / "moe", folder / "twin"
    trained = _train(moe, "a mixture of experts", ["model.twin=false", *(overrides or [])])
    _train(twin, "its dense twin", ["model.twin=true", *(overrides or [])])
    a, b, races = compare(moe, twin)
    texts = [_write(trained.checkpoint, prompt) for prompt in _PROMPTS]
    if json:
        print_json({**as_json(a, b, races), "router": trained.router, "texts": texts})
        return
    typer.echo(chart([a, b]))
    typer.echo("\n" + comparison(a, b, races))
    typer.echo("\n" + health(moe, trained))
    for text in texts:
        typer.echo(f"\nthe mixture of experts writes:\n{text}")
    typer.echo(f"\nNext: {command()} watch {moe}")


def health(run: Path, trained: "TrainResult") -> str:
    """The router's last watch set, and how each layer's load is spread over its experts."""
    from expertly.watch.records import ROUTER, read_records
    from expertly.watch.report import readings, spread

    rows = [["router", "now", "healthy"], *map(list, readings(trained.router or {}))]
    loads = [record["load"] for record in read_records(run / ROUTER) if "load" in record][-1]
    bars = [f"layer {layer}  {spread(load)}" for layer, load in enumerate(loads)]
    title = "load of each expert (half height is an even share)"
    return "\n".join([table(rows), "", title, *bars])


def _train(run: Path, what: str, overrides: list[str]) -> "TrainResult":
    from expertly.config import load
    from expertly.train.config import TrainConfig
    from expertly.train.loop import run as train

    typer.echo(f"training {what} in {run}", err=True)
    given = [*overrides, f"output_dir={run}"]
    config = load(TrainConfig, Path(__file__).with_name("demo.yaml"), given)
    return train(config, resume=True)


def _write(checkpoint: Path, prompt: str) -> str:
    from expertly.engine.generate import Sampling, generate_ids
    from expertly.models.loading import open_model
    from expertly.models.tokenizer import decode, encode_prompt, open_tokenizer

    tokenizer = open_tokenizer(checkpoint)
    ids = encode_prompt(tokenizer, prompt)
    answer = generate_ids(open_model(checkpoint), ids, Sampling(max_new_tokens=80))
    return prompt + decode(tokenizer, answer)
