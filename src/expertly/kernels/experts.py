"""The experts function: what transformers calls in place of an experts module's forward.

A module is typed Any: its flags are transformers' own.
It follows transformers' contract for `ExpertsInterface` functions and reads the module's own
flags, so one function serves every family: with or without gate, bias, transposed weights.
"""

from typing import Any

import torch
from torch import Tensor

from expertly.kernels.gate import apply_gate
from expertly.kernels.grouped import combine, dispatch, grouped_linear, sort_by_expert
from expertly.kernels.low_rank import low_rank_linear, low_rank_of
from expertly.kernels.packed_experts import packed_experts_forward
from expertly.kernels.packed_linear import compute_dtype


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run each token through its chosen experts and weigh the answers: (tokens, dim).

    hidden_states: (tokens, dim); top_k_index, top_k_weights: (tokens, top_k). Under autocast the
    weights are cast to its dtype, as torch does for dense layers. Experts that hold packed weights
    in a submodule `packed` run on those. Low-rank terms beside the weights are added.
    """
    packed = getattr(experts, "packed", None)
    if packed is not None:
        return packed_experts_forward(experts, packed, hidden_states, top_k_index, top_k_weights)
    dtype = compute_dtype(hidden_states)
    order = sort_by_expert(top_k_index, experts.down_proj.shape[0])
    x = dispatch(hidden_states.to(dtype), order)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _linear(experts, up, x, order.counts, dtype)
    inner = apply_gate(experts, inner) if experts.has_gate else experts.act_fn(inner)
    out = _linear(experts, "down_proj", inner, order.counts, dtype)
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    return combine(out, top_k_weights, order).to(hidden_states.dtype)


def _linear(experts: Any, name: str, x: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """One of the module's stacked projections, with its low-rank term and bias where it has any."""
    weight = getattr(experts, name).to(dtype)
    out = grouped_linear(x, weight.mT if experts.is_transposed else weight, counts)
    if (term := low_rank_of(experts, name)) is not None:
        out = out + low_rank_linear(x, term, counts)
    if not experts.has_bias:
        return out
    bias = getattr(experts, f"{name}_bias").to(dtype)
    return out + bias.repeat_interleave(counts, dim=0, output_size=len(out))
