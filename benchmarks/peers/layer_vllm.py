"""vLLM's fused experts for CPUs, bf16; isa: "vec" or "amx"."""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from layer import LayerEngine
from torch import Tensor
from wire import serve


class Vllm(LayerEngine):
    def __init__(self, isa: str, shape: list[int], threads: int):
        self.isa = isa
        spec = find_spec("vllm")
        assert spec is not None and spec.origin is not None
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.abi3.so")))
        if isa == "amx":  # a process asks Linux for its tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, 18)
            ctypes.CDLL(None).syscall(158, 0x1023, 18)
        super().__init__(shape, threads)

    def pack(self, layer: int, gate_up: Tensor, down: Tensor) -> Any:
        packed = torch.empty_like(gate_up), torch.empty_like(down)
        for weight, target in zip((gate_up, down), packed, strict=True):
            torch.ops._C.prepack_moe_weight(weight, target, self.isa)
        return packed

    def run(self, packed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        given = (out, x, *packed, None, None, weights, ids.int(), False, "silu", self.isa)
        torch.ops._C.cpu_fused_moe(*given)
        return out


if __name__ == "__main__":
    serve(Vllm)
