"""A layer's experts on packed weights: what stands in for a family's parameters, and its forward.

Every family's layout is brought into one when its experts are packed: rows of all gates, then of
all ups, then down. Decode and prefill run as one native call; gradients, other gates and machines
without the native kernels take the same steps as experts.py, one after the other.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.kernels.gate import apply_gate, is_hooked
from expertly.kernels.grouped import Order, combine, dispatch, sort_by_expert
from expertly.kernels.low_rank import low_rank_linear, low_rank_of
from expertly.kernels.native import Gate
from expertly.kernels.packed import BLOCK, PackedWeight, empty_packed
from expertly.kernels.packed_linear import (
    PackedModule,
    compute_dtype,
    grouped_packed_linear,
    native_for,
    readable,
)
from expertly.kernels.quantize import quantize_rows

# transformers' classes
_ACTS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
_PLAIN = ("_default_apply_gate", "BeamExperts._apply_gate")  # act(gate) * up
# gpt-oss's clamped SwiGLU, and where each family keeps its two numbers
_CLAMPED = {
    "GptOssExperts._apply_gate": ("alpha", "limit"),
    "OpenAIPrivacyFilterExperts._apply_gate": ("alpha", "limit"),
    "MiniMaxM3VLExperts._apply_gate": ("swiglu_alpha", "swiglu_limit"),
}
_DENSE = ("gate_up_proj", "up_proj", "down_proj")


class PackedExperts(PackedModule):
    """A layer's experts, packed: gate_up (experts, rows, dim), down (experts, dim, hidden).

    gate_up holds the gates' rows, then the ups'; at 16 bits each padded to a multiple of 16, and
    down's inputs as well. Without gates it holds the ups alone. Biases are (experts, rows) float32.
    """

    gate_up: PackedWeight
    down: PackedWeight
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        gate_up: PackedWeight,
        down: PackedWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        hidden: int,
        gated: bool,
    ) -> None:
        super().__init__()
        self.hidden, self.gated = hidden, gated
        self.num_experts, self.dim = gate_up.experts, gate_up.shape[-1]
        self.hold("gate_up", gate_up)
        self.hold("down", down)
        self.register_buffer("gate_up_bias", gate_up_bias)
        self.register_buffer("down_bias", down_bias)

    def write(
        self, name: str, weight: Tensor, expert: int | None = None, *, search: bool = False
    ) -> None:
        """Pack one dense projection in place, so that loading can let it go at once.

        name: gate, up or down; weight: (out, in) of one expert, or (experts, out, in) of all, of
        any strides. Raises E301 for another shape or values that are not finite.
        """
        packed = self.down if name == "down" else self.gate_up
        out, width = (self.dim, self.hidden) if name == "down" else (self.hidden, self.dim)
        self._check(f"{name}_proj", weight, (out, width), expert)
        padding = packed.shape[-1] - width
        matrices = enumerate(weight) if expert is None else [(expert, weight)]
        for index, matrix in matrices:
            what = f"{name}_proj of expert {index}"
            even = F.pad(matrix, (0, padding)) if padding else matrix
            quantize_rows(packed, even, index, self._start(name), search=search, name=what)

    def write_bias(self, name: str, bias: Tensor) -> None:
        """Put one projection's biases (experts, out) in place. Raises E301 for another shape."""
        held = self.down_bias if name == "down" else self.gate_up_bias
        assert held is not None
        self._check(f"{name}_proj_bias", bias, (self.dim if name == "down" else self.hidden,))
        start = self._start(name)
        held[:, start : start + bias.shape[-1]] = bias.detach()

    def _check(
        self, name: str, weight: Tensor, shape: tuple[int, ...], expert: int | None = None
    ) -> None:
        """Refuse what would be cropped, or written over others."""
        wanted = (self.num_experts, *shape) if expert is None else shape
        if weight.shape != wanted:
            why = f"found {tuple(weight.shape)}, expected {wanted}"
            raise ExpertlyError("E301", name, why, fix="fetch or convert the model again")

    def _start(self, name: str) -> int:
        """A projection's first row."""
        return self.gate_up.shape[1] // 2 if name == "up" and self.gated else 0

    def extra_repr(self) -> str:
        bits = f"bits={self.down.bits}, group_size={self.down.group_size}"
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, {bits}"


class Sizes(NamedTuple):
    """What a layer's experts are made of."""

    num_experts: int
    dim: int
    hidden: int
    gated: bool = True
    biased: bool = False


def empty_experts(
    sizes: Sizes, bits: int, group_size: int = 32, zeros: torch.dtype | None = None
) -> PackedExperts:
    """Packed experts of zeros, to write projections into as they arrive.

    zeros: the kind of zero points, as in empty_packed. Raises E202 for widths that the groups do
    not divide.
    """
    hidden, groups = sizes.hidden, group_size
    if bits == 16:
        hidden, groups = -(-hidden // BLOCK) * BLOCK, 0
    rows = (1 + sizes.gated) * hidden
    gate_up = empty_packed((sizes.num_experts, rows, sizes.dim), bits, groups, zeros)
    down = empty_packed((sizes.num_experts, sizes.dim, hidden), bits, groups, zeros)
    biases = [
        torch.zeros(sizes.num_experts, width) if sizes.biased else None
        for width in (rows, sizes.dim)
    ]
    return PackedExperts(gate_up, down, *biases, hidden=sizes.hidden, gated=sizes.gated)


def sizes_of(experts: Any) -> Sizes:
    """A family's experts module in our words, from the shapes of its parameters."""
    down = experts.down_proj
    dim, hidden = down.shape[:0:-1] if experts.is_transposed else down.shape[1:]
    return Sizes(down.shape[0], dim, hidden, experts.has_gate, experts.has_bias)


def pack_experts(
    experts: Any,
    bits: int,
    group_size: int = 32,
    *,
    zeros: torch.dtype | None = None,
    search: bool = False,
) -> PackedExperts:
    """Quantise the parameters of a family's experts module; replace_experts puts them in place.

    Raises E202 for widths that the groups do not divide, E301 for values that are not finite.
    """
    packed = empty_experts(sizes_of(experts), bits, group_size, zeros)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    inner, down = (
        weight.mT if experts.is_transposed else weight
        for weight in (getattr(experts, up), experts.down_proj)
    )
    for name, weight in {**split_gate(experts, inner), "down": down}.items():
        packed.write(name, weight, search=search)
    if experts.has_bias:
        biases = split_gate(experts, getattr(experts, f"{up}_bias"))
        for name, bias in {**biases, "down": experts.down_proj_bias}.items():
            packed.write_bias(name, bias)
    return packed


def split_gate(experts: Any, rows: Tensor) -> dict[str, Tensor]:
    """Views of a family's gate and up rows, (experts, rows, ..), whichever way they are mixed."""
    if not experts.has_gate:
        return {"up": rows}
    if experts.is_concatenated:
        gate, up = rows.chunk(2, dim=1)
    else:
        gate, up = rows[:, ::2], rows[:, 1::2]
    return {"gate": gate, "up": up}


def replace_experts(experts: Any, packed: PackedExperts) -> None:
    """Put packed weights where a family's experts module kept its parameters."""
    for name in _DENSE:
        for parameter in (name, f"{name}_bias"):
            if parameter in experts._parameters:
                delattr(experts, parameter)
    experts.packed = packed


def known_gate(experts: Any) -> Gate | None:
    """The module's gate as the kernels compute it; None for experts that only the module can run.

    Those with a norm of their own, another activation, or one with a hook such as expert dropout.
    """
    if experts.has_post_expert_norm:
        return None
    if experts.has_gate:
        name = experts._apply_gate.__qualname__
        if name in _CLAMPED:
            alpha, limit = _CLAMPED[name]
            return Gate("clamped", True, getattr(experts, alpha), getattr(experts, limit))
        if name not in _PLAIN:
            return None
    act_fn = experts.act_fn
    if act_fn is F.silu:
        return Gate("silu", experts.has_gate)
    act = _ACTS.get(type(act_fn).__name__)
    return None if act is None or is_hooked(act_fn) else Gate(act, experts.has_gate)


def packed_experts_forward(
    experts: Any,
    packed: PackedExperts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run each token through its chosen packed experts and weigh the answers: (tokens, dim).

    hidden_states: (tokens, dim); top_k_index, top_k_weights: (tokens, top_k). Ids beyond the
    experts, as expert parallelism passes, and weights of 0 are skipped. Differentiable by
    hidden_states, top_k_weights and the module's low-rank terms.
    """
    x = hidden_states.to(compute_dtype(hidden_states))
    native, asked = native_for(x), x.requires_grad or top_k_weights.requires_grad
    apart = hasattr(experts, "low_rank") or (asked and torch.is_grad_enabled())
    gate = None if native is None or apart else known_gate(experts)
    if native is None or gate is None:
        out = _one_by_one(experts, packed, x, top_k_index, top_k_weights)
    else:
        stacks = packed.gate_up, packed.down, packed.gate_up_bias, packed.down_bias
        out = native.experts(*stacks, gate, readable(x), top_k_index, top_k_weights)
    return out.to(hidden_states.dtype)


def _one_by_one(
    experts: Any, packed: PackedExperts, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The steps of experts.py, one after the other, on the assignments that count."""
    order = _order(index, weights, packed.num_experts)
    counts = order.counts[:-1]
    kept = int(counts.sum())
    x = dispatch(x, order)[:kept]
    exact = packed.training
    inner = grouped_packed_linear(x, packed.gate_up, packed.gate_up_bias, counts, exact=exact)
    up = low_rank_of(experts, "gate_up_proj" if packed.gated else "up_proj")
    inner = _own_gate(
        experts, packed, inner, None if up is None else low_rank_linear(x, up, counts)
    )
    out = grouped_packed_linear(inner, packed.down, packed.down_bias, counts, exact=exact)
    if (down := low_rank_of(experts, "down_proj")) is not None:
        out = out + low_rank_linear(inner[:, : packed.hidden], down, counts)
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    out = F.pad(out, (0, 0, 0, len(order.packed) - kept))
    return combine(out, weights, order)


def _order(index: Tensor, weights: Tensor, num_experts: int) -> Order:
    """The assignments by expert, with one expert more, the last, for those that do not count."""
    dropped = (index < 0) | (index >= num_experts)
    if not weights.requires_grad:  # the gradient of a weight of 0 needs the expert's answer
        dropped |= weights == 0
    return sort_by_expert(index.masked_fill(dropped, num_experts), num_experts + 1)


def _own_gate(experts: Any, packed: PackedExperts, inner: Tensor, term: Tensor | None) -> Tensor:
    """The module's own gate, given and taken in its own layout and without padding.

    term: what is added before it, (assignments, out) in that layout.
    """
    padding = packed.down.shape[-1] - packed.hidden
    if packed.gated:
        pair = inner.unflatten(-1, (2, -1))[..., : packed.hidden]
        inner = (pair if experts.is_concatenated else pair.mT).flatten(-2)
    else:
        inner = inner[..., : packed.hidden]
    if term is not None:
        inner = inner + term
    inner = apply_gate(experts, inner) if packed.gated else experts.act_fn(inner)
    return F.pad(inner, (0, padding)) if padding else inner
