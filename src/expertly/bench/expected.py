"""What of a model is measured here, and how: its first layers, formats and tokens, all checked."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from expertly.bench.machine import DTYPES
from expertly.bench.steps import WARM_UP
from expertly.errors import ExpertlyError
from expertly.families import decoder as decoder_of
from expertly.memory import size
from expertly.models.packing import HEAD_BITS
from expertly.models.packing import Precision as Packing
from expertly.plan.precision import QUANTISABLE, Precision, precision, symmetric, weights
from expertly.plan.shape import Shape

BATCH = 8  # sequences that packed weights are decoded with besides one
_PROMPT, _LONG_PROMPT = 128, 512  # tokens; the long one gives packed experts many rows each
_SPELT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_PACKED = re.compile(r"16|(4|8)(?:g(32|64|128))?")
GROUP = 32  # as open_model's


class Expected(NamedTuple):
    """What a prediction needs: the layers that are measured, and how."""

    shape: Shape
    precision: Precision
    dtype: str
    prompt: int
    new: int
    packing: Packing | None


def packing_of(bits: str | None) -> Packing | None:
    """What --bits says of packed weights: 4, 8, 16 or as 4g64. Raises E208 for anything else."""
    if bits is None:
        return None
    found = _PACKED.fullmatch(bits.strip())
    if found is None:
        why = f"{bits[:40]!r} is nothing that the engine packs"
        fix = "with --measure write 4, 8 or 16, or 4g64 for groups of 64 (32, 64 or 128)"
        raise ExpertlyError("E208", "--bits", why, fix=fix)
    return Packing(int(found[1]), int(found[2] or GROUP)) if found[1] else Packing(16, 0)


def expect(
    shape: Shape,
    config: Mapping[str, Any],
    *,
    dtype: str | None,
    prompt: int | None,
    new: int,
    free: float,
    packing: Packing | None = None,
) -> Expected:
    """What is measured, with words and numbers checked.

    dtype None: the config's own; prompt None: 128 tokens, of packed weights 512; free: bytes that
    weights may take. Raises E208 for what cannot be measured, E402 when not one layer has room.
    """
    dtype = _SPELT.get(dtype, dtype) if dtype else said_dtype(config)
    prompt = prompt if prompt is not None else _LONG_PROMPT if packing else _PROMPT
    if dtype not in DTYPES:
        why = f"{dtype!r} is nothing that a model can be run in here"
        raise ExpertlyError("E208", "--dtype", why, fix=f"choose one of {', '.join(DTYPES)}")
    if min(prompt, new) < 1:
        why = f"a prompt of {prompt} tokens and {new} new ones"
        raise ExpertlyError("E208", "--measure", why, fix="ask for at least one of each")
    if shape.context:
        prompt = max(1, min(prompt, shape.context - new - WARM_UP))
    formats = precision(shape, dtype)
    if packing:
        shape, formats = _untied(shape), packed_formats(formats, packing)
    return Expected(first_layers(shape, formats, free), formats, dtype, prompt, new, packing)


def packed_formats(formats: Precision, packing: Packing) -> Precision:
    """The format of every part of a packed model; of those that are not packed as given."""
    bits, group = packing
    head = symmetric(max(bits, HEAD_BITS), group)
    return {**formats, **dict.fromkeys(QUANTISABLE, symmetric(bits, group)), "head": head}


def first_layers(shape: Shape, formats: Precision, free: float) -> Shape:
    """A shape, or as many of its first layers as have room in so many bytes.

    Raises E402 when there is none for a single one.
    """
    for count in range(len(shape.layers), 0, -1):
        cut = replace(shape, layers=shape.layers[:count])
        need = weight_bytes(cut, formats)
        if need <= free:
            return cut
    why = f"one layer and its ends take {size(need)}, and {size(free)} may be taken"
    raise ExpertlyError("E402", shape.name, why, fix="measure a smaller model")


def weight_bytes(shape: Shape, formats: Precision) -> float:
    """Of all weights together."""
    return sum(held.resident for held in weights(shape, formats).values())


def said_dtype(config: Mapping[str, Any]) -> str:
    """What a config.json says, where a model can be run in it; bf16 otherwise."""
    said = (
        part.get(key) for part in (config, decoder_of(config)) for key in ("dtype", "torch_dtype")
    )
    return next((_SPELT[str(name)] for name in said if str(name) in _SPELT), "bf16")


def _untied(shape: Shape) -> Shape:
    """With a head of its own, which packing makes beside embeddings that were the head, too."""
    return replace(shape, head=shape.vocab * shape.dim) if shape.tied else shape
