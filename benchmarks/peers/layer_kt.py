"""kt-kernel's experts; kind: AMXInt4_MOE, AMXInt8_MOE or AMXBF16_MOE.

They take AMX where there is some and AVX-512 elsewhere. int4 has one scale a row.
"""

from tempfile import mkdtemp
from typing import Any

import torch
from kt_kernel import kt_kernel_ext
from layer import LayerEngine
from torch import Tensor
from wire import serve

_LONGEST = 4096  # tokens in one call


class KtKernel(LayerEngine):
    def __init__(self, kind: str, shape: list[int], threads: int):
        self.kind = getattr(kt_kernel_ext.moe, kind)
        self.cpu = kt_kernel_ext.CPUInfer(threads)
        self.folder = mkdtemp()
        super().__init__(shape, threads)

    def pack(self, layer: int, gate_up: Tensor, down: Tensor) -> Any:
        shape, moe = self.shape, kt_kernel_ext.moe
        on_gpu = torch.zeros(shape.experts, dtype=torch.bool)
        places = (shape.experts, shape.top_k, shape.dim, shape.width, on_gpu.data_ptr())
        config = moe.MOEConfig(*places)
        gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=1))
        config.layer_idx, config.pool, config.max_len = layer, self.cpu.backend_, _LONGEST
        config.save, config.load, config.path = False, False, self.folder
        config.gate_proj, config.up_proj = gate.data_ptr(), up.data_ptr()
        config.down_proj = down.data_ptr()
        order = torch.arange(shape.experts)
        made = self.kind(config)
        self.cpu.submit(made.load_weights_task(order.data_ptr()))
        self.cpu.sync()
        return made, on_gpu

    def run(self, packed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, count = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        tensors = (ids, weights, x, out)
        pointers = [tensor.data_ptr() for tensor in tensors]
        task = packed[0].forward_task(count.data_ptr(), ids.shape[1], *pointers, False)
        self.cpu.submit(task)
        self.cpu.sync()
        return out


if __name__ == "__main__":
    serve(KtKernel)
