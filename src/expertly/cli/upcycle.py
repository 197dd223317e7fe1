"""expertly upcycle: a dense model becomes an MoE; what was made, and the proof."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expertly.cli.options import Json, command, number, print_json
from expertly.memory import size

if TYPE_CHECKING:
    from expertly.upcycle.run import UpcycleResult


def upcycle(
    dense: Annotated[
        Path,
        typer.Argument(help="A dense model's folder, or mergekit-moe's YAML.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(help="The MoE's folder.", show_default=False)],
    experts: Annotated[
        int | None,
        typer.Option(min=2, help="All together.", show_default="8 x slices, or as in the YAML"),
    ] = None,
    slices: Annotated[
        int, typer.Option(min=1, help="Cut each copy of the feed-forward into so many experts.")
    ] = 1,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="A multiple of slices.", show_default="two copies")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Experts in each n-th layer.")] = 1,
    shared: Annotated[
        bool, typer.Option("--shared", help="Keep the dense feed-forward as an always-on expert.")
    ] = False,
    drop: Annotated[
        float, typer.Option(help="Drop-Upcycling: this share of an expert's units begins anew.")
    ] = 0.0,
    drop_apart: Annotated[
        bool, typer.Option("--drop-apart", help="Drop other units in gate, up and down.")
    ] = False,
    noise: Annotated[
        float, typer.Option(help="On each expert, as a share of its matrices' deviation.")
    ] = 0.0,
    router: Annotated[
        Literal["random", "zero", "clusters"],
        typer.Option(help="How routers begin; clusters: from k-means of your data."),
    ] = "random",
    target: Annotated[
        str, typer.Option(help="mixtral, qwen2_moe, ..", show_default="the first that fits")
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text for proof and clusters: a file, folder or stdlib; repeatable."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Of held-out text, for the proof.")] = 4096,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
) -> None:
    """Make an MoE of a dense model that computes the same, and prove it on held-out text.

    Copies and slices change nothing; drop, noise and several specialists do, on purpose, and the
    receipt says by how much. Example: expertly upcycle smollm2 smollm2-moe --experts 8 --top-k 2
    """
    from expertly.config import build
    from expertly.upcycle.config import UpcycleConfig
    from expertly.upcycle.run import run

    given = {
        "model": str(dense),
        "output_dir": str(output),
        "num_experts": experts,
        "slices": slices,
        "top_k": top_k,
        "every": every,
        "shared": shared,
        "drop": drop,
        "drop_apart": drop_apart,
        "noise": noise,
        "router": router,
        "target": target,
        "data": data or ["stdlib"],
        "tokens": tokens,
        "seed": seed,
    }
    config = build(UpcycleConfig, given)
    result = run(config, lambda line: typer.echo(line, err=True))
    if json:
        print_json(asdict(result))
    else:
        typer.echo(_page(result))


def _page(made: "UpcycleResult") -> str:
    kept = "the same function" if made.exact else "changed on purpose"
    dense, moe = made.perplexity["dense"], made.perplexity["moe"]
    lines = [
        f"{made.target}: {made.num_experts} experts in each of {made.moe_layers} layers, top "
        f"{made.top_k}",
        f"parameters   {number(made.parameters)}, active {number(made.active_parameters)}, "
        f"{size(made.bytes)}",
        f"logits       differ by {made.largest_logit_difference:.2g} at most: {kept}",
        f"perplexity   {moe:.3f}, the dense model's {dense:.3f}, on held-out text",
        f"cost         {made.seconds:.0f} s, {size(made.peak_bytes)} of memory",
        f"folder       {made.folder}",
        f"try it       {command()} generate {made.folder} --prompt 'def main('",
    ]
    if made.slices > 1:
        lines.append(
            "train on     with optim.router_learning_rate at a hundredth of the rest, so that a "
            "token keeps all slices of its copies at first"
        )
    return "\n".join(lines)
