"""expertly finetune: adapt a pretrained MoE to a small set, and say what it did to its routing."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expertly.cli.options import Json, command, number, print_json
from expertly.cli.watch import drift_table

if TYPE_CHECKING:
    from expertly.train.finetune import FinetuneResult


def finetune(
    model: Annotated[Path, typer.Argument(help="A pretrained MoE's folder.", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            help="Conversations: a .jsonl, .json or .parquet file, or hf:NAME; rows with messages, "
            "prompt and completion, conversations (ShareGPT), or text.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in optim.learning_rate=1e-4")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder.", show_default="runs/MODEL-DATA")
    ] = None,
    method: Annotated[
        Literal["lora", "full"],
        typer.Option(help="lora: low-rank adapters beside the weights; full: all weights."),
    ] = "lora",
    router: Annotated[
        Literal["frozen", "trainable", "lora"],
        typer.Option(help="trainable: at a tenth of the rate; lora: by an adapter."),
    ] = "frozen",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 8,
    bits: Annotated[
        int | None,
        typer.Option(help="Pack the weights while they load: 4 or 8.", show_default="as they are"),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    base_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text of the base's own domains, to see what is forgotten; may be repeated.",
            show_default="stdlib",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where it stopped.")
    ] = False,
    json: Json = False,
) -> None:
    """Fine-tune a pretrained MoE on conversations, and prove what changed.

    Only what the assistant says is learnt. The router stands still unless --router says otherwise,
    and the report shows how routing and the loss on the base's domains drifted.
    Example: expertly finetune smollm2-moe chats.jsonl --bits 4 --output runs/chat
    """
    from expertly.train.finetune import Recipe, run, train_config

    folder = output or Path("runs") / f"{model.resolve().name}-{Path(data).stem}"
    recipe = Recipe(
        model=str(model),
        data=(data,),
        output_dir=str(folder),
        method=method,
        router=router,
        rank=rank,
        bits=bits,
        epochs=epochs,
        base_data=tuple(base_data or ["stdlib"]),
    )
    try:
        result = run(train_config(recipe, overrides or []), _say, resume=resume)
    except KeyboardInterrupt:
        typer.echo("expertly: --resume goes on from the newest checkpoint", err=True)
        raise
    if json:
        print_json(asdict(result))
    else:
        typer.echo(_page(result))


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _page(done: "FinetuneResult") -> str:
    share = done.learning_parameters / done.parameters
    changed = ", ".join(f"{part} {count}" for part, count in done.changed.items())
    lines = [
        drift_table(done.drift),
        "",
        f"learnt        {number(done.learning_parameters)} of {number(done.parameters)} parameters "
        f"({share:.2%}), {done.steps} steps",
        f"changed       {changed}",
        f"checkpoint    {done.checkpoint}",
        f"page          {done.page}",
        f"talk to it    {command()} generate {done.checkpoint} --chat",
    ]
    if share < 1:
        lines.append(f"merge it      {command()} merge {done.checkpoint} {done.run}-merged")
    return "\n".join(lines)
