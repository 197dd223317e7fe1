"""The dense model that a packed one stands for: its weights as numbers, in the family's layout."""

import torch

from expertly.kernels.packed import dequantize
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.layers import bare
from expertly.models.packing import experts_modules


@torch.no_grad()
def write_dense(packed_model, dense_model):
    """Copy what packed weights mean into a model of the same make without any."""
    for name, module in packed_model.named_modules():
        if isinstance(module, PackedLinear):
            plain = name.replace(".base_layer", "")
            dense_model.get_submodule(plain).weight.copy_(dequantize(module.weight))
    for name, experts in experts_modules(packed_model).items():
        target = dense_model.get_submodule(name.replace(".base_layer", ""))
        packed = getattr(bare(experts), "packed", None)
        if packed is None:
            continue
        rows, down = dequantize(packed.gate_up), dequantize(packed.down)
        width = packed.hidden
        half = rows.shape[1] // 2 if packed.gated else rows.shape[1]
        parts = [rows[:, start : start + width] for start in range(0, rows.shape[1], half)]
        first = torch.cat(parts, dim=1)
        if packed.gated and not experts.is_concatenated:
            first = torch.stack(parts, dim=2).flatten(1, 2)
        down = down[..., :width]
        stack = target.gate_up_proj if packed.gated else target.up_proj
        for parameter, weight in ((stack, first), (target.down_proj, down)):
            parameter.copy_(weight.mT if experts.is_transposed else weight)
