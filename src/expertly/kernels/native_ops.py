"""What stands between the packed linears when one token is decoded, each in one native call.

Attention over the cache, and the router. The C++ is in cpu/ops_attention.cpp and cpu/ops_route.cpp,
and says which papers it follows. Forward only, on the CPU, in float32 or bfloat16.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.kernels import native_abi as abi
from expertly.kernels.native import TYPES, library, pointer, type_of

NORMS = ("none", "each head", "all heads", "each rotated head")
SCORES = ("softmax", "sigmoid", "softmax of the chosen")


class AttentionForm(NamedTuple):
    """What a family's attention does to queries and keys between its projections."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of their products, before the softmax
    clip: float = 0.0  # queries, keys and values stay within +-clip; 0: as they are
    norm: str = "none"  # one of NORMS: an RMSNorm of queries and of keys
    eps: float = 0.0  # the norm's


class New(NamedTuple):
    """What one new token per sequence brings to attention; numbers of one dtype, contiguous."""

    q: Tensor  # (batch, .., heads * head_dim)
    k: Tensor  # (batch, .., kv_heads * head_dim)
    v: Tensor
    cos: Tensor  # (batch or 1, .., rotated): the rotary embedding's, each angle twice
    sin: Tensor


class Room:
    """A layer's cache with room for more tokens: keys and values (batch, kv_heads, room, head_dim).

    Both are contiguous and of one dtype, else ValueError. Checked once, for it is used often.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        whole = keys.is_contiguous() and values.is_contiguous() and keys.dim() == 4
        if not whole or (keys.shape, keys.dtype) != (values.shape, values.dtype):
            raise ValueError("keys and values must be contiguous and of one shape and dtype")
        self.keys, self.values, self.dtype = keys, values, keys.dtype
        self.batch, self.kv_heads, self.size, self.head_dim = keys.shape


class RouterForm(NamedTuple):
    """A routing rule in numbers; what they mean stands in expertly.moe.routing."""

    top_k: int
    score: str = "softmax"  # one of SCORES
    renormalize: bool = False
    num_groups: int = 1  # each worth its two best experts together
    topk_groups: int = 1
    epsilon: float = 0.0
    scale: float = 1.0
    exact: bool = True  # False: logits are rounded to the input's dtype first
    logits_dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.float32


class Operations:
    """The native operations around the experts, of a loaded library."""

    def __init__(self, handle: ctypes.CDLL, isa: int):
        self._isa = isa
        self._attend = abi.typed(handle, "attend")
        self._route = abi.typed(handle, "route")

    def attend(
        self,
        form: AttentionForm,
        new: New,
        room: Room,
        length: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        """Put a token behind the `length` that are in the cache, and attend to all of them.

        Returns (batch, heads * head_dim). q_norm, k_norm: the norms' weights, (head_dim,) or of
        all heads. Raises ValueError for tensors that do not fit one another.
        """
        _check_attention(form, new, room)
        q, kind = new.q, type_of(new.q)
        shape = attention_of(form, q_norm, k_norm)
        places = [q.data_ptr(), new.k.data_ptr(), new.v.data_ptr()]
        now = decoding_of(places, new.cos, new.sin, room, length)
        out = q.new_empty(room.batch, form.heads * form.head_dim)
        code = self._attend(
            self._isa,
            torch.get_num_threads(),
            byref(shape),
            now,
            kind,
            room.batch,
            out.data_ptr(),
        )
        abi.check("attend", code)
        return out

    def route(
        self, form: RouterForm, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (tokens, experts), weights and expert ids (tokens, top_k) of x (tokens, dim).

        weight: (experts, dim); bias: (experts,) float32, added for the choice only.
        """
        _check_router(x, weight, bias)
        router, experts = router_of(form, weight, bias), len(weight)
        tokens = x.shape[0]
        logits = x.new_empty(tokens, experts, dtype=form.logits_dtype)
        weights = x.new_empty(tokens, form.top_k, dtype=form.weights_dtype)
        ids = x.new_empty(tokens, form.top_k, dtype=torch.int64)
        code = self._route(
            self._isa,
            1,  # waking another costs more
            byref(router),
            x.data_ptr(),
            type_of(x),
            tokens,
            logits.data_ptr(),
            TYPES[form.logits_dtype],
            weights.data_ptr(),
            TYPES[form.weights_dtype],
            ids.data_ptr(),
        )
        abi.check("route", code)
        return logits, weights, ids


def attention_of(
    form: AttentionForm, q_norm: Tensor | None, k_norm: Tensor | None
) -> abi.Attention:
    """A form in C, with the weights of its norms. Raises ValueError where those do not fit it."""
    if q_norm is not None and k_norm is not None and q_norm.dtype is not k_norm.dtype:
        raise ValueError(f"attention: norms of {q_norm.dtype} and {k_norm.dtype}")
    return abi.Attention(
        *form[:5],
        NORMS.index(form.norm),
        0 if q_norm is None else type_of(q_norm),
        form.eps,
        _norm_pointer(form, q_norm, form.heads),
        _norm_pointer(form, k_norm, form.kv_heads),
    )


def decoding_of(new: Sequence[int], cos: Tensor, sin: Tensor, room: Room, length: int) -> bytes:
    """A new token's place in C, behind `length` others. new: where its q, k and v lie."""
    angles = cos.data_ptr(), sin.data_ptr(), cos.shape[-1], cos.shape[0]
    cache = room.keys.data_ptr(), room.values.data_ptr(), room.size, length
    return abi.decoding(*new, *angles, *cache)


def router_of(form: RouterForm, weight: Tensor, bias: Tensor | None) -> abi.Router:
    """A form in C, with the router's weight (experts, dim) and selection bias (experts,)."""
    return abi.Router(
        weight.data_ptr(),
        pointer(bias),
        type_of(weight),
        SCORES.index(form.score),
        *weight.shape,
        form.top_k,
        form.num_groups,
        form.topk_groups,
        form.renormalize,
        form.exact,
        form.epsilon,
        form.scale,
    )


def operations() -> Operations | None:
    """The native operations; None without the compiled library."""
    loaded = library()
    return None if loaded is None else Operations(loaded.handle, loaded.isa)


def _check_attention(form: AttentionForm, new: New, room: Room) -> None:
    """The sizes that the native side cannot see; ValueError."""
    q, k, v, cos, sin = new
    cached = room.batch * room.kv_heads * room.head_dim
    if (
        q.numel() != room.batch * form.heads * form.head_dim
        or k.numel() != cached
        or v.numel() != cached
        or (form.kv_heads, form.head_dim) != (room.kv_heads, room.head_dim)
        or cos.shape != sin.shape
        or cos.numel() != cos.shape[0] * cos.shape[-1]
    ):
        raise ValueError("attention: queries, keys, values and cache are not of one shape")
    for each in new:
        if each.dtype is not room.dtype or not each.is_contiguous():
            raise ValueError("attention: tensors must be contiguous and of the cache's dtype")


def _norm_pointer(form: AttentionForm, weight: Tensor | None, heads: int) -> int | None:
    if weight is None:
        return None
    if weight.numel() != form.head_dim * (heads if form.norm == "all heads" else 1):
        raise ValueError(f"attention: a norm of {weight.numel()} numbers does not fit its heads")
    if not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError("attention: a norm must be contiguous, on the CPU")
    return weight.data_ptr()


def _check_router(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"router: x is {tuple(x.shape)}, its weight {tuple(weight.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("router: tensors must be contiguous")
    if bias is None:
        return
    if bias.dtype != torch.float32 or bias.numel() != len(weight) or not bias.is_cpu:
        raise ValueError("router: the bias must be float32, one for each expert, on the CPU")
    if not bias.is_contiguous():
        raise ValueError("router: the bias must be contiguous")
