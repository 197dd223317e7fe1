"""expertly plan: will it fit, how fast, what does it cost, MoE or dense?"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

from expertly.cli import plan_flags as f
from expertly.cli.options import Json, print_json
from expertly.errors import ExpertlyError


def plan(
    typed: typer.Context,
    model: f.Model = None,
    dtype: f.Dtype = None,
    bits: f.Bits = None,
    kv_bits: f.KvBits = 16,
    context: f.Context = None,
    batch: f.Batch = 1,
    gpu: f.Gpu = None,
    gpus: f.Gpus = None,
    memory: f.Memory = None,
    link: f.Link = None,
    offload: f.Offload = None,
    hit_rate: f.HitRate = None,
    ram: f.Ram = None,
    hardware: f.Hardware = None,
    vs: f.Vs = None,
    fit: f.Fit = None,
    method: f.Method = "full",
    rank: f.Rank = 16,
    fsdp: f.Fsdp = None,
    ep: f.Ep = 1,
    tp: f.Tp = 1,
    imbalance: f.Imbalance = None,
    train_batch: f.TrainBatch = None,
    keep_activations: f.KeepActivations = False,
    train_tokens: f.TrainTokens = None,
    tuning_tokens: f.TuningTokens = None,
    utilisation: f.Utilisation = None,
    gpu_hours: f.GpuHours = None,
    price: f.Price = None,
    plot: f.Plot = None,
    measure: f.Measure = False,
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
    _answer(model, asked, json)


def _answer(model: str, asked: Mapping[str, Any], json: bool) -> None:
    """Plan, and draw and measure if that is asked; the page comes at once, before measuring."""
    from expertly.cli.plan_page import page
    from expertly.cli.plan_question import question_of
    from expertly.plan.job import plan as answer

    if asked["measure"]:
        from expertly.cli.plan_more import require_packed

        require_packed(asked["bits"])
    question = question_of(model, asked)
    found = answer(question)
    if asked["plot"] is not None:
        from expertly.plan.plot import draw

        draw(found, asked["plot"])
    if not json:
        typer.echo(page(found))
    if asked["measure"]:
        from expertly.cli.plan_more import measured, measured_page

        result = measured(model, question.shape, asked)
        found["measured"] = asdict(result)
        if not json:
            typer.echo(f"\n{measured_page(result)}")
    if json:
        print_json(found)


def _not_empty(asked: Mapping[str, Any]) -> None:
    """Raises E208 for a flag with nothing in it, as --gpu "$GPU" is where GPU is not set."""
    for name, value in asked.items():
        if value == "" and name != "model":
            flag = "--" + name.replace("_", "-")
            raise ExpertlyError("E208", flag, "is empty", fix=f"leave out {flag}")


def _was_written(typed: typer.Context, name: str) -> bool:
    """Whether a flag stands on the command line, and is no default."""
    source = typed.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
