"""A model with random packed weights at real sizes, of which no weight is held in high precision.

Only one matrix at a time is drawn, packed and let go, as open_model packs while it loads.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from expertly.bench.random_model import Numbers, materialise, meta_model
from expertly.families import family_of
from expertly.kernels.packed import PackedWeight, empty_packed, row_chunks
from expertly.kernels.packed_experts import empty_experts, sizes_of
from expertly.kernels.quantize import quantize_rows
from expertly.models.experts import register_experts
from expertly.models.lean import make_lean
from expertly.models.loading import Model
from expertly.models.packing import (
    STACKS,
    Precision,
    experts_modules,
    install_experts,
    install_linear,
    plan_packing,
)


def packed_model(
    raw: Mapping[str, Any],
    dtype: torch.dtype,
    layers: int | None = None,
    *,
    precision: Precision,
) -> Model:
    """The model of a config.json with random packed weights, lean, in evaluation mode.

    dtype: of what is not packed. layers: how many of its first ones; None: all. Raises what
    open_config raises, and what open_model raises for weights that cannot be packed.
    """
    model = meta_model(raw, dtype, layers)
    plan = plan_packing(model, precision)
    embeddings: Any = model.get_input_embeddings()
    packed = {id(model.get_parameter(name)) for name in plan}
    materialise(model, leave=packed - {id(embeddings.weight)})  # which a tied head has, too
    numbers = Numbers(model)
    for path, experts in experts_modules(model).items():
        _pack_experts(experts, plan[f"{path}.down_proj"], numbers)
    for name, asked in plan.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in STACKS:
            shape = tuple(model.get_parameter(name).shape)
            install_linear(model, path, _random_weight(shape, asked, numbers))
    if family_of(raw) is not None:
        model.set_experts_implementation(register_experts())
    make_lean(model.eval())
    return model


def tiny_maker(precision: Precision) -> Any:
    """What makes a tiny model with weights of so many bits; its groups are the smallest."""
    return partial(packed_model, precision=precision._replace(group_size=min(32, precision[1])))


def _random_weight(shape: tuple[int, ...], asked: Precision, numbers: Numbers) -> PackedWeight:
    packed = empty_packed(shape, *asked)
    for rows in row_chunks(*shape):
        quantize_rows(packed, numbers.matrix(rows.stop - rows.start, shape[1]), 0, rows.start)
    return packed


def _pack_experts(experts: Any, asked: Precision, numbers: Numbers) -> None:
    """Put random packed experts in the place of a module's parameters.

    All are the first one's copies, which takes as long to read and a fraction of the time to make.
    """
    size = sizes_of(experts)
    packed = empty_experts(size, *asked)
    for name, shape in _matrices(size.dim, size.hidden, gated=size.gated).items():
        packed.write(name, numbers.matrix(*shape), 0)
    for weight in (packed.gate_up, packed.down):
        for part in (weight.data, weight.scales):
            if part is not None:
                part[1:] = part[0]
    install_experts(experts, packed)


def _matrices(dim: int, hidden: int, *, gated: bool) -> dict[str, tuple[int, int]]:
    """(out, in) of an expert's projections."""
    inner = {"gate": (hidden, dim), "up": (hidden, dim)} if gated else {"up": (hidden, dim)}
    return {**inner, "down": (dim, hidden)}
