"""Draw a plan: decode speed against batch, and where the memory goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError

_FORMATS = (".png", ".svg", ".pdf")
_INK, _MOE, _DENSE = "#1b1b1b", "#d1495b", "#30638e"
# what a bar is made of, from its floor up
_STACK = {
    "experts": _MOE,
    "shared experts": "#edae49",
    "dense layers": _DENSE,
    "attention": "#66a182",
    "embeddings, head and the rest": "#8d96a3",
    "KV cache": "#2e4057",
}


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Write a plan's chart to a .png, .svg or .pdf file.

    Raises E207 without matplotlib, E208 for another suffix, E211 where nothing can be written.
    """
    if file.suffix.lower() not in _FORMATS:
        fix = f"end it in {', '.join(_FORMATS)}"
        raise ExpertlyError("E208", "--plot", f"{file.name[:60]!r} is no picture", fix=fix)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install 'expertly[plot]'"
        raise ExpertlyError("E207", "--plot", "matplotlib is not installed", fix=fix) from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speeds(left, found)
    _memory(right, found)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        why = error.strerror or str(error)
        raise ExpertlyError(
            "E211", str(file), why, fix="name a file in a folder of yours"
        ) from error


def _speeds(axes: Any, found: Mapping[str, Any]) -> None:
    """Tokens per second of the MoE and of the dense model, by batch."""
    axes.set_title(f"decode speed at best, {_where(found)}", loc="left", fontsize=10)
    against = found["decode"]
    if not against:
        axes.set_axis_off()
        return
    batches = [each["batch"] for each in against["rows"]]
    for key, name, color in (
        ("moe", found["model"], _MOE),
        ("dense", against["against"], _DENSE),
    ):
        speeds = [each[key]["tokens_per_second"] for each in against["rows"]]
        axes.plot(batches, speeds, color=color, marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="sequences at a time", ylabel="tokens per second")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    _plain(axes)


def _memory(axes: Any, found: Mapping[str, Any]) -> None:
    """Bytes by part, stacked, of each model; the dotted line is what the machine has."""
    models = found["models"]
    floors = [0.0] * len(models)
    for part, color in _STACK.items():
        heights = [_bytes(model, part) / 1e9 for model in models]
        if any(heights):
            axes.bar(range(len(models)), heights, bottom=floors, width=0.6, color=color, label=part)
        floors = [floor + height for floor, height in zip(floors, heights, strict=True)]
    for place, top in enumerate(floors):
        axes.annotate(f"{top:.3g} GB", (place, top), ha="center", va="bottom", fontsize=9)
    machine = found["machine"]
    axes.axhline(
        machine["memory_bytes"] * machine["gpus"] / 1e9, color=_INK, linewidth=1, linestyle=":"
    )
    axes.set_title(f"memory, dotted: {_where(found)}", loc="left", fontsize=10)
    names = [
        f"{model['name'].replace(', ', ',' + chr(10))}\n{model['precision']}" for model in models
    ]
    axes.set_xticks(range(len(models)), names)
    axes.set_ylabel("GB")
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _plain(axes)


def _bytes(model: Mapping[str, Any], part: str) -> float:
    held = model["bytes_by_part"]
    if part in held:
        return held[part]
    named = set(_STACK)
    return (
        sum(count for name, count in held.items() if name not in named) if "rest" in part else 0.0
    )


def _where(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['gpus']} x {machine['device']} of {machine['memory_bytes'] / 1e9:.3g} GB"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
