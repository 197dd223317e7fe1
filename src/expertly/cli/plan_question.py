"""From the words of `expertly plan` to a Question. Nothing here needs torch, as a rule."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError
from expertly.plan.hardware import Device, Link, device_of, devices, link_of, links
from expertly.plan.known import config_of
from expertly.plan.memory import require
from expertly.plan.precision import precision
from expertly.plan.question import Question
from expertly.plan.reading import has_formulas, read_shape, shape_of_counts
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
    against = shape_of_target(asked["vs"]) if asked["vs"] else None
    device = device_for(asked)
    return Question(
        shape=shape,
        precision=precision(shape, asked["dtype"], asked["bits"]),
        against=against,
        against_precision=precision(against, asked["dtype"]) if against else None,
        device=device,
        memory=device.memory,
        gpus=whole("--gpus", asked["gpus"]),
        links=links_for(device, asked),
        context=context_for(shape, asked),
        batch=asked["batch"],
        kv_bits=asked["kv_bits"],
        imbalance=asked["imbalance"],
        offload=asked["offload"] and link_of(asked["offload"], asked["hardware"]),
        hit_rate=share("--hit-rate", asked["hit_rate"]),
        **_training(asked),
    )


def shape_of_target(target: str) -> Shape:
    """The Shape of a built-in name, a folder or a file; torch counts where no formula does."""
    name, config = config_of(target)
    if has_formulas(config):
        return read_shape(config, name)
    from expertly.models.count import count_parameters

    try:
        counted = count_parameters(config)
    except ExpertlyError as error:  # names the folder that it is built in
        raise ExpertlyError(error.code, target, error.why, fix=error.fix) from error
    return shape_of_counts(config, name, counted.layers, counted.rest)


def device_for(asked: Asked) -> Device:
    """The device that is named; else the smallest one on the market with the memory; else H100."""
    extra: Path | None = asked["hardware"]
    size = bytes_of(asked["memory"], "--memory") if asked["memory"] else None
    if asked["gpu"]:
        found = device_of(asked["gpu"], extra)
    elif size:
        rented = [each for each in devices(extra).values() if each.usd_per_hour]
        enough = [each for each in rented if each.memory >= size] or rented[-1:]
        found = min(enough, key=lambda each: each.memory)
    else:
        found = device_of("h100", extra)
    return replace(found, memory=size) if size else found


def links_for(device: Device, asked: Asked) -> tuple[Link, ...]:
    """The link between GPUs that is asked for, or the device's own, then the usual networks."""
    first = link_of(asked["link"] or device.link, asked["hardware"])
    known = links(asked["hardware"])
    return first, *(known[name] for name in _NETWORKS if name != first.name)


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


def whole(flag: str, value: int | None) -> int | None:
    """A count that may be left out; E208 for one below 1."""
    if value is not None:
        require(flag, value, 1, 1e6)
    return value


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
        whole(f"--{name}", asked[name])
    fsdp = asked["fsdp"] or max(asked["ep"] // asked["tp"], 1)
    return {
        **counts,
        "method": asked["method"],
        "layout": Layout(fsdp=fsdp, ep=asked["ep"], tp=asked["tp"]) if spread else None,
        "checkpointing": not asked["keep_activations"],
        "utilisation": asked["utilisation"],
        "price": asked["price"],
    }
