"""Experts alone, the same for every engine: weights, routing, inputs, and how they are timed.

Every layer has weights of its own and every call a routing draw of its own, so that no cache holds
what is read. Weights and inputs are normal numbers in bf16; weights of deviation 1/sqrt(inputs).
"""

import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    layers: int
    experts: int
    top_k: int
    dim: int
    width: int


class LayerEngine:
    """What an engine adds: pack(layer, gate_up, down) and run(packed, x, ids, weights).

    gate_up: (experts, 2 * width, dim), gate rows first; down: (experts, dim, width); both bf16.
    x: (tokens, dim) in dtype; ids, weights: (tokens, top_k), int64 and float32.
    """

    dtype = torch.bfloat16

    def __init__(self, shape: list[int], threads: int):
        torch.set_num_threads(threads)
        self.shape, self.threads, self.draws = Shape(*shape), threads, 0
        layers = range(self.shape.layers)
        self.packed = [self.pack(layer, *weights_of(self.shape, layer)) for layer in layers]

    def pack(self, layer: int, gate_up: Tensor, down: Tensor) -> Any:
        raise NotImplementedError

    def run(self, packed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def round(self, tokens: int, layers: int, even: bool = False) -> dict[str, Any]:
        """Seconds a layer, and how many different experts a layer read, over some layers."""
        seconds, distinct = 0.0, 0
        for packed in self.packed[:layers]:
            self.draws += 1
            x, ids, weights = call_of(self.shape, tokens, self.draws, even=even)
            x = x.to(self.dtype)
            started = time.perf_counter()
            self.run(packed, x, ids, weights)
            seconds += time.perf_counter() - started
            distinct += len(ids.unique())
        return {"seconds": seconds / layers, "distinct": distinct / layers}

    @torch.inference_mode()
    def error(self, tokens: int) -> dict[str, float | None]:
        """Relative error of the first layer: against its weights, and against what it stores."""
        x, ids, weights = call_of(self.shape, tokens, 0)
        got = self.run(self.packed[0], x.to(self.dtype), ids, weights).double()
        original = weights_of(self.shape, 0)
        wanted = reference(*original, x, ids, weights)
        stored = self.stored(self.packed[0])
        kernel = None if stored is None else far(got, reference(*stored, x, ids, weights))
        return {"error": far(got, wanted), "kernel": kernel}

    def stored(self, packed: Any) -> tuple[Tensor, Tensor] | None:
        """gate_up and down as they are after packing, where the engine tells."""
        return None


def weights_of(shape: Shape, layer: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(layer)
    experts, dim, width = shape.experts, shape.dim, shape.width
    gate_up = torch.randn(experts, 2 * width, dim, generator=generator) / dim**0.5
    down = torch.randn(experts, dim, width, generator=generator) / width**0.5
    return gate_up.bfloat16(), down.bfloat16()


def call_of(
    shape: Shape, tokens: int, draw: int, *, even: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights of one call; even: every expert gets as many tokens as any other."""
    generator = torch.Generator().manual_seed(10_000 + draw)
    x = torch.randn(tokens, shape.dim, generator=generator).bfloat16()
    scores = torch.rand(tokens, shape.experts, generator=generator)
    ids = scores.topk(shape.top_k).indices
    if even:
        ids = torch.arange(tokens * shape.top_k).view(tokens, shape.top_k) % shape.experts
    weights = torch.rand(tokens, shape.top_k, generator=generator)
    return x, ids, weights / weights.sum(1, keepdim=True)


def reference(gate_up: Tensor, down: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer in float64, expert after expert."""
    x, out = x.double(), torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    for expert in ids.unique().tolist():
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].double().T).chunk(2, dim=1)
        share = weights[token, place].double().unsqueeze(1)
        out.index_add_(0, token, (F.silu(gate) * up) @ down[expert].double().T * share)
    return out


def far(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
