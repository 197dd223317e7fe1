"""From the words of `expertly plan` to a Question. Nothing here needs torch, as a rule."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError
from expertly.plan.counted import check_sizes, shape_of_counts
from expertly.plan.hardware import Device, Link, device_of, devices, link_of, links
from expertly.plan.known import config_of
from expertly.plan.memory import require
from expertly.plan.options import MOST_GPUS
from expertly.plan.precision import precision
from expertly.plan.question import Question
from expertly.plan.reading import has_formulas, read_shape
from expertly.plan.shape import Shape
from expertly.plan.training import Layout
from expertly.plan.units import bytes_of, count_of

Asked = Mapping[str, Any]  # the flags, by name
_CONTEXT = 4096
_NETWORKS = ("infiniband-400", "ethernet-100")  # between machines


def question_of(model: str, asked: Asked) -> Question:
    """What the flags ask about a model. Raises E208 for what they cannot say, and what reading a
    model raises.
    """
    shape = shape_of_target(model)
    against = dense_of_target(asked["vs"]) if asked["vs"] else None
    _only_for_experts(shape, asked)
    device = device_for(asked)
    return Question(
        shape=shape,
        precision=precision(shape, asked["dtype"], asked["bits"]),
        against=against,
        against_precision=(precision(against, asked["dtype"], asked["bits"]) if against else None),
        device=device,
        gpus=gpus_for(asked),
        networks=_networks(asked),
        context=context_for(shape, asked),
        batch=asked["batch"],
        kv_bits=asked["kv_bits"],
        imbalance=asked["imbalance"],
        offloaded=bool(asked["offload"]),
        hit_rate=share("--hit-rate", asked["hit_rate"]),
        ram=bytes_of(asked["ram"], "--ram") if asked["ram"] else None,
        **_training(asked),
    )


def shape_of_target(target: str) -> Shape:
    """The Shape of a built-in name, a folder or a file; torch counts where no formula does."""
    name, config = config_of(target)
    try:
        if has_formulas(config):
            return read_shape(config, name)
        check_sizes(config)  # before torch is asked
        from expertly.models.count import count_parameters

        counted = count_parameters(config)
        return shape_of_counts(config, name, counted.layers, counted.rest)
    except ExpertlyError as error:  # say whose config it is
        raise ExpertlyError(error.code, target, error.why, fix=error.fix) from error


def dense_of_target(target: str) -> Shape:
    """As shape_of_target, of a dense model; E208 for one with experts."""
    shape = shape_of_target(target)
    if shape.moe_layers:
        why, fix = f"{shape.name} has experts itself", "name the MoE first, and a dense model here"
        raise ExpertlyError("E208", "--vs", why, fix=fix)
    return shape


def device_for(asked: Asked) -> Device:
    """The device that is named; else the smallest one on the market with the memory; else H100.

    With the memory and the links that are asked for.
    """
    extra: Path | None = asked["hardware"]
    flag = "fit" if asked["fit"] else "memory"
    size = bytes_of(asked[flag], f"--{flag}") if asked[flag] else None
    if asked["gpu"]:
        found = device_of(asked["gpu"], extra)
    elif size:
        rented = [each for each in devices(extra).values() if each.usd_per_hour]
        enough = [each for each in rented if each.memory >= size]
        if not enough:
            most = max(each.memory for each in rented) / 1e9
            why, fix = f"no GPU on the market has more than {most:g} GB", "add --gpu, or --gpus"
            raise ExpertlyError("E208", f"--{flag}", why, fix=fix)
        found = min(enough, key=lambda each: each.memory)
    else:
        found = device_of("h100", extra)
    if asked["link"]:  # it joins all of them, near and far
        link = link_of(asked["link"], extra)
        found = replace(found, link=link, network=link)
    if asked["offload"]:
        found = replace(found, host_link=link_of(asked["offload"], extra, "--offload"))
    return replace(found, memory=size or found.memory)


def gpus_for(asked: Asked) -> int | None:
    """How many are there: as said, or the one that is named; None where nothing is named."""
    if asked["gpus"] is not None:
        require("--gpus", asked["gpus"], 1, MOST_GPUS)
    spread = asked["fsdp"] or asked["ep"] > 1 or asked["tp"] > 1
    named = (asked["gpu"] or asked["memory"] or asked["offload"]) and not spread
    return asked["gpus"] or (1 if named else None)


def _networks(asked: Asked) -> tuple[Link, ...]:
    known = links(asked["hardware"])
    return tuple(known[name] for name in _NETWORKS)


def _only_for_experts(shape: Shape, asked: Asked) -> None:
    """Raises E208 for what a dense model has no use of."""
    for name in ("ep", "offload", "hit_rate", "ram", "imbalance"):
        said, flag = asked[name] not in (None, 1), f"--{name.replace('_', '-')}"
        if said and not shape.moe_layers:
            why = f"{shape.name} has no experts"
            raise ExpertlyError("E208", flag, why, fix=f"leave out {flag}")


def context_for(shape: Shape, asked: Asked) -> int:
    """How long sequences are; E208 for longer than the model was made for."""
    longest = shape.context or _CONTEXT
    context = asked["context"]
    if context is None:
        return min(_CONTEXT, longest)
    require("--context", context, 1)
    if shape.context and context > longest:
        why = f"is {context}, but {shape.name} was made for {longest}"
        raise ExpertlyError("E208", "--context", why, fix=f"write --context {longest}")
    return context


def share(flag: str, value: float | None) -> float | None:
    """A share that may be left out; E208 for one that is not from 0 to 1."""
    if value is not None:
        require(flag, value, 0, 1)
    return value


def _training(asked: Asked) -> dict[str, Any]:
    """What is asked of training and its cost."""
    counts = {
        name: count_of(asked[name], "--" + name.replace("_", "-")) if asked[name] else None
        for name in ("train_tokens", "tuning_tokens", "gpu_hours")
    }
    spread = asked["fsdp"] or asked["ep"] > 1 or asked["tp"] > 1
    for name in ("fsdp", "ep", "tp"):
        require(f"--{name}", 1 if asked[name] is None else asked[name], 1, MOST_GPUS)
    fsdp = asked["fsdp"] or max((asked["gpus"] or asked["ep"]) // asked["tp"], 1)
    return {
        **counts,
        "method": asked["method"],
        "rank": asked["rank"],
        "train_batch": asked["train_batch"],
        "mixed": asked["dtype"] not in ("fp32", "float32"),
        "layout": Layout(fsdp=fsdp, ep=asked["ep"], tp=asked["tp"]) if spread else None,
        "checkpointing": not asked["keep_activations"],
        "utilisation": asked["utilisation"],
        "price": asked["price"],
    }
