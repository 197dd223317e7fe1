"""What stands between the packed linears when one token is decoded, each in one native call.

Attention over the cache, and the router. The C++ is in cpu/ops_attention.cpp and cpu/ops_route.cpp,
and says which papers it follows. Forward only, on the CPU, in float32 or bfloat16.
"""

import ctypes
from ctypes import Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.kernels.native import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}
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


class _Attention(Structure):
    _fields_ = [
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("clip", c_float),
        ("norm", c_int32),
        ("norm_type", c_int32),
        ("eps", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    ]


class _Decoding(Structure):
    _fields_ = [
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rotated", c_int64),
        ("rotated_batch", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("room", c_int64),
        ("length", c_int64),
    ]


class _Router(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_type", c_int32),
        ("score", c_int32),
        ("experts", c_int64),
        ("dim", c_int64),
        ("top_k", c_int64),
        ("groups", c_int64),
        ("top_groups", c_int64),
        ("renormalise", c_int32),
        ("exact", c_int32),
        ("eps", c_float),
        ("factor", c_float),
    ]


_ARGUMENTS = {
    "expertly_attend": (c_int, c_int, c_void_p, c_void_p, c_int, c_int64, c_void_p),
    "expertly_route": (
        *(c_int, c_void_p, c_void_p, c_int, c_int64),
        *(c_void_p, c_int, c_void_p, c_int, c_void_p),
    ),
}
_WRONG = {
    -1: "a tensor is missing",
    -2: "this machine lacks the instruction set asked for",
    -3: "at least one thread is needed, and no more than 4096",
    -8: "a size is zero or negative",
    -9: "the sizes overflow",
    -10: "float32 or bfloat16 is needed",
    -14: "no memory",
    -20: "heads must be a multiple of 32 wide and divide into those of the cache",
    -21: "the cache has no room for another token",
    -22: "the rotary embedding does not fit the heads",
    -23: "the norm of queries and keys is unknown",
    -24: "more experts are chosen than there are",
    -25: "experts do not divide into the groups",
    -26: "the score is unknown",
}


class Operations:
    """The native operations around the experts, of a loaded library."""

    def __init__(self, handle: ctypes.CDLL, isa: int):
        self._isa = isa
        self._attend = _typed(handle, "expertly_attend")
        self._route = _typed(handle, "expertly_route")

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
        q, cos = new.q, new.cos
        shape = _Attention(
            *form[:5],
            NORMS.index(form.norm),
            0 if q_norm is None else TYPES[q_norm.dtype],
            form.eps,
            _norm_pointer(form, q_norm, form.heads),
            _norm_pointer(form, k_norm, form.kv_heads),
        )
        now = _Decoding(
            *(each.data_ptr() for each in new),
            cos.shape[-1],
            cos.shape[0],
            room.keys.data_ptr(),
            room.values.data_ptr(),
            room.size,
            length,
        )
        out = torch.empty(room.batch, form.heads * form.head_dim, dtype=q.dtype)
        code = self._attend(
            self._isa,
            torch.get_num_threads(),
            byref(shape),
            byref(now),
            TYPES[q.dtype],
            room.batch,
            out.data_ptr(),
        )
        _check_code("expertly_attend", code)
        return out

    def route(
        self, form: RouterForm, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (tokens, experts), weights and expert ids (tokens, top_k) of x (tokens, dim).

        weight: (experts, dim); bias: (experts,) float32, added for the choice only.
        """
        experts, dim = weight.shape
        _check_router(x, weight, bias)
        router = _Router(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            TYPES[weight.dtype],
            SCORES.index(form.score),
            experts,
            dim,
            form.top_k,
            form.num_groups,
            form.topk_groups,
            form.renormalize,
            form.exact,
            form.epsilon,
            form.scale,
        )
        tokens = x.shape[0]
        logits = torch.empty(tokens, experts, dtype=form.logits_dtype)
        weights = torch.empty(tokens, form.top_k, dtype=form.weights_dtype)
        ids = torch.empty(tokens, form.top_k, dtype=torch.int64)
        code = self._route(
            self._isa,
            byref(router),
            x.data_ptr(),
            TYPES[x.dtype],
            tokens,
            logits.data_ptr(),
            TYPES[form.logits_dtype],
            weights.data_ptr(),
            TYPES[form.weights_dtype],
            ids.data_ptr(),
        )
        _check_code("expertly_route", code)
        return logits, weights, ids


def operations() -> Operations | None:
    """The native operations; None without the compiled library."""
    loaded = library()
    return None if loaded is None else Operations(loaded.handle, loaded.isa)


def _typed(handle: ctypes.CDLL, name: str) -> Any:
    function = getattr(handle, name)
    function.argtypes, function.restype = _ARGUMENTS[name], c_int
    return function


def _check_code(name: str, code: int) -> None:
    if code:
        raise ValueError(f"{name}: {_WRONG.get(code, f'error {code}')}")


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
    return weight.data_ptr()


def _check_router(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"router: x is {tuple(x.shape)}, its weight {tuple(weight.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("router: tensors must be contiguous")
    if bias is not None and (bias.dtype != torch.float32 or bias.numel() != weight.shape[0]):
        raise ValueError("router: the bias must be float32, one for each expert")
