"""onnxruntime's QMoE on its CPU kernels: one node a layer, 4 or 8 bits in blocks of 32."""

from typing import Any

import numpy as np
import onnxruntime
import torch
from layer import LayerEngine, Shape
from onnx import TensorProto, helper
from torch import Tensor
from wire import serve

_BLOCK = 32


class OnnxRuntime(LayerEngine):
    dtype = torch.float32

    def __init__(self, bits: int, shape: list[int], threads: int):
        self.bits = bits
        super().__init__(shape, threads)

    def pack(self, layer: int, gate_up: Tensor, down: Tensor) -> Any:
        # silu(gate) * up wants the rows of both interleaved
        gate, up = gate_up.chunk(2, dim=1)
        rows = torch.stack((gate, up), dim=2).flatten(1, 2)
        w1, s1 = _quantized(rows.float(), self.bits)
        w2, s2 = _quantized(down.float(), self.bits)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        made = _model(self.shape, self.bits)
        session = onnxruntime.InferenceSession(made, options, ["CPUExecutionProvider"])
        return session, {"w1": w1, "s1": s1, "w2": w2, "s2": s2}

    def run(self, packed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Routing as logits: log of the weights where an expert is chosen, far below elsewhere."""
        session, given = packed
        logits = torch.full((len(x), self.shape.experts), -1e4)
        logits.scatter_(1, ids, weights.log())
        feed = {**given, "x": x.numpy(), "router": logits.numpy()}
        return torch.from_numpy(session.run(None, feed)[0])


def _quantized(weight: Tensor, bits: int) -> tuple[Any, Any]:
    """Levels and scales, symmetric to the middle level; two levels a byte at 4 bits."""
    groups = weight.unflatten(-1, (-1, _BLOCK))
    middle = 1 << (bits - 1)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = extreme / -middle
    levels = (groups / scales + middle).round().clamp(0, 2 * middle - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        levels = levels[..., ::2] | levels[..., 1::2] << 4
    return levels.numpy(), scales.squeeze(-1).numpy().astype(np.float32)


def _model(shape: Shape, bits: int) -> bytes:
    names = ("x", "router", "w1", "s1", "", "w2", "s2")
    node = helper.make_node(
        "QMoE",
        names,
        ["y"],
        domain="com.microsoft",
        k=shape.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
        expert_weight_bits=bits,
        block_size=_BLOCK,
    )
    kinds = {name: TensorProto.FLOAT for name in ("x", "router", "s1", "s2", "y")}
    kinds |= dict.fromkeys(("w1", "w2"), TensorProto.UINT8)
    infos = {name: helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()}
    inputs = [infos[name] for name in names if name]
    graph = helper.make_graph([node], "experts", inputs, [infos["y"]])
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    return model.SerializeToString()


if __name__ == "__main__":
    serve(OnnxRuntime)
