"""expertly demo: train a small MoE and its dense twin on real text, side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from expertly.cli.compare import comparison
from expertly.cli.options import table

_PROMPTS = ("def __init__(self, ", "The function returns ")


def demo(
    folder: Annotated[Path, typer.Option(help="Where both runs go.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in schedule.max_steps=50")
    ] = None,
) -> None:
    """Train a small MoE and its dense twin on the text every Python carries, and compare them.

    A demo that was stopped goes on where it was. Example: expertly demo --folder runs/demo
    """
    from expertly.train.compare import chart, compare

    moe, twin = folder / "moe", folder / "twin"
    results = [
        _train(moe, "a mixture of experts", ["model.twin=false", *(overrides or [])]),
        _train(twin, "its dense twin", ["model.twin=true", *(overrides or [])]),
    ]
    a, b, races = compare(moe, twin)
    typer.echo(chart([a, b]))
    typer.echo("\n" + comparison(a, b, races))
    typer.echo("\n" + health(moe))
    for prompt in _PROMPTS:
        typer.echo(f"\nthe mixture of experts writes, after {prompt!r}:")
        typer.echo(_write(results[0].checkpoint, prompt))
    typer.echo(f"\nNext: expertly inspect {results[0].checkpoint}")


def health(run: Path) -> str:
    """The router's last watch set, and how each layer's load is spread over its experts."""
    from expertly.train.log import METRICS, ROUTER, read_records

    watched = [record["moe"] for record in read_records(run / METRICS) if "moe" in record][-1]
    loads = read_records(run / ROUTER)[-1]["load"]
    rows = [["router", "now", "healthy"]]
    rows += [
        ["dead experts", f"{watched['dead_frac']:.0%}", "0%"],
        ["load entropy", f"{watched['entropy_norm']:.3f}", "near 1"],
        ["hottest expert", f"{watched['max_load_ratio']:.2f}x its share", "below 2x"],
        ["effective experts", f"{watched['effective_experts']:.1f} of {len(loads[0])}", "most"],
        ["dropped tokens", f"{watched['dropped_frac']:.1%}", "0%"],
    ]
    bars = [f"layer {i}  {spread(load)}" for i, load in enumerate(loads)]
    return "\n".join(
        [table(rows), "", "load of each expert (a full block is twice its share)", *bars]
    )


def spread(load: list[float]) -> str:
    """One bar per expert; half height is an even share."""
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[min(7, int(share * len(load) * 4))] for share in load)


def _train(run: Path, what: str, overrides: list[str]) -> Any:
    from expertly.config import load
    from expertly.train.config import TrainConfig
    from expertly.train.loop import CONFIG
    from expertly.train.loop import run as train

    typer.echo(f"training {what} in {run}", err=True)
    given = [*overrides, f"output_dir={run}"]
    config = load(TrainConfig, Path(__file__).with_name("demo.yaml"), given)
    return train(config, resume=(run / CONFIG).exists())


def _write(checkpoint: Path, prompt: str) -> str:
    from expertly.engine.generate import Sampling, generate_ids
    from expertly.models.loading import open_model
    from expertly.models.tokenizer import decode, encode_prompt, open_tokenizer

    tokenizer = open_tokenizer(checkpoint)
    ids = encode_prompt(tokenizer, prompt)
    answer = generate_ids(open_model(checkpoint), ids, Sampling(max_new_tokens=80))
    return prompt + decode(tokenizer, answer)
