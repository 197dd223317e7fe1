"""expertly's native experts, at 4, 8 or 16 bits."""

from typing import Any

import torch
from layer import LayerEngine
from torch import Tensor
from wire import serve

from expertly.kernels.native import Gate, library
from expertly.kernels.packed import dequantize
from expertly.kernels.quantize import quantize


class Ours(LayerEngine):
    def __init__(self, bits: int, shape: list[int], threads: int, dtype: str = "bfloat16"):
        kernels = library()
        if kernels is None:
            raise RuntimeError("the kernels are not compiled")
        self.bits, self.kernels, self.gate = bits, kernels, Gate("silu")
        self.dtype = getattr(torch, dtype)
        super().__init__(shape, threads)

    def pack(self, layer: int, gate_up: Tensor, down: Tensor) -> Any:
        return quantize(gate_up, self.bits), quantize(down, self.bits)

    def run(self, packed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = packed
        return self.kernels.experts(gate_up, down, None, None, self.gate, x, ids, weights)

    def stored(self, packed: Any) -> tuple[Tensor, Tensor]:
        gate_up, down = (dequantize(each) for each in packed)
        return gate_up, down


if __name__ == "__main__":
    serve(Ours)
