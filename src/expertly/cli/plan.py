"""expertly plan: will it fit, how fast, what does it cost, MoE or dense?"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from expertly.cli.options import Json, print_json
from expertly.errors import ExpertlyError


def _flag(panel: str, help: str, name: str | None = None) -> Any:
    words = () if name is None else (name,)
    return typer.Option(*words, help=help, rich_help_panel=panel, show_default=False)


def _not_empty(asked: Mapping[str, Any]) -> None:
    """Raises E208 for a flag with nothing in it, as --gpu "$GPU" is where GPU is not set."""
    for name, value in asked.items():
        if value == "" and name != "model":
            flag = "--" + name.replace("_", "-")
            raise ExpertlyError("E208", flag, "is empty", fix=f"leave out {flag}")


_MODEL, _MACHINE, _AGAINST, _TRAIN = "Model", "Machine", "Comparison", "Training and cost"


def plan(
    typed: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a config.json or a built-in name.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None, _flag(_MODEL, "Format of all weights: fp32, bf16, fp8, int8, mxfp4 ...")
    ] = None,
    bits: Annotated[
        str | None,
        _flag(_MODEL, "Bits of experts, dense layers and attention: 4, 4g32, 3,attention=4."),
    ] = None,
    kv_bits: Annotated[float, _flag(_MODEL, "Bits of the KV cache. Default: 16.")] = 16,
    context: Annotated[
        int | None, _flag(_MODEL, "Tokens of a sequence. Default: 4096, or what the model allows.")
    ] = None,
    batch: Annotated[int, _flag(_MODEL, "Sequences at a time. Default: 1.")] = 1,
    gpu: Annotated[
        str | None, _flag(_MACHINE, "h100, h200, a100-80gb, 4090, mi300x, m4-max, cpu ...")
    ] = None,
    gpus: Annotated[
        int | None, _flag(_MACHINE, "How many. Default: 1 if named, else as many as it takes.")
    ] = None,
    memory: Annotated[str | None, _flag(_MACHINE, "Of each GPU: 24GB.")] = None,
    link: Annotated[
        str | None, _flag(_MACHINE, "Between GPUs: nvlink4, infiniband-400, ethernet-100 ...")
    ] = None,
    offload: Annotated[
        str | None, _flag(_MACHINE, "Keep experts behind a link: pcie4 (RAM), nvme (disk) ...")
    ] = None,
    hit_rate: Annotated[
        float | None, _flag(_MACHINE, "Share of expert requests that the cache serves.")
    ] = None,
    ram: Annotated[
        str | None, _flag(_MACHINE, "For experts beside the GPUs. Default: 4 times their memory.")
    ] = None,
    hardware: Annotated[
        Path | None, _flag(_MACHINE, "Your own machines: a YAML file, laid over the table.")
    ] = None,
    vs: Annotated[str | None, _flag(_AGAINST, "A dense model to compare with.")] = None,
    fit: Annotated[
        str | None, _flag(_AGAINST, "List the built-in models that fit into so much memory: 24GB.")
    ] = None,
    method: Annotated[str, _flag(_TRAIN, "full, lora or qlora. Default: full.")] = "full",
    rank: Annotated[int, _flag(_TRAIN, "Of LoRA's adapters. Default: 16.")] = 16,
    fsdp: Annotated[int | None, _flag(_TRAIN, "GPUs that shard the training state.")] = None,
    ep: Annotated[int, _flag(_TRAIN, "Ranks that share out the experts. Default: 1.")] = 1,
    tp: Annotated[int, _flag(_TRAIN, "Ranks that share every matrix. Default: 1.")] = 1,
    imbalance: Annotated[
        float | None,
        _flag(
            _TRAIN, "Tokens of the fullest expert rank over the mean. Default: 1; training: 1.5."
        ),
    ] = None,
    keep_activations: Annotated[
        bool, _flag(_TRAIN, "Without gradient checkpointing.", "--keep-activations")
    ] = False,
    train_tokens: Annotated[
        str | None,
        _flag(_TRAIN, "To train from scratch on: 15T. Default: 20 per active parameter."),
    ] = None,
    tuning_tokens: Annotated[str | None, _flag(_TRAIN, "In a fine-tuning set: 50M.")] = None,
    utilisation: Annotated[
        float | None, _flag(_TRAIN, "Share of the peak that training reaches. Default: 0.4.")
    ] = None,
    gpu_hours: Annotated[
        str | None, _flag(_TRAIN, "GPU-hours that training took, instead: 2.788M.")
    ] = None,
    price: Annotated[float | None, _flag(_TRAIN, "USD per GPU and hour.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed and memory: a .png, .svg or .pdf file.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run it here, and compare with the prediction.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a model costs to store, run and train, beside the dense models it competes with.

    Example: expertly plan mixtral-8x7b --vs llama-2-70b --gpu 4090 --gpus 2
    """
    asked = {name: value for name, value in locals().items() if name not in ("typed", "json")}
    _not_empty(asked)
    if fit is not None:
        from expertly.cli.plan_more import print_fits

        print_fits(asked, [name for name in asked if _was_written(typed, name)], json)
        return
    if model is None:
        fix = "name a model, as expertly plan mixtral-8x7b"
        raise ExpertlyError("E208", "plan", "neither a model nor --fit", fix=fix)
    from expertly.cli.plan_page import page
    from expertly.cli.plan_question import question_of
    from expertly.plan.job import plan as answer

    question = question_of(model, asked)
    found = answer(question)
    if plot is not None:
        from expertly.plan.plot import draw

        draw(found, plot)
    if not json:
        typer.echo(page(found))
    if measure:
        from expertly.cli.plan_more import measured, measured_page

        result = measured(model, question.shape, asked)
        found["measured"] = asdict(result)
        if not json:
            typer.echo(f"\n{measured_page(result)}")
    if json:
        print_json(found)


def _was_written(typed: typer.Context, name: str) -> bool:
    """Whether a flag stands on the command line, and is no default."""
    source = typed.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
