"""transformers' experts implementations on a Mixtral layer's experts, in bf16 or fp32."""

from typing import Any

import torch
from layer import LayerEngine
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from wire import serve


class Transformers(LayerEngine):
    """implementation: eager, grouped_mm or batched_mm. compiled: through torch.compile."""

    def __init__(self, dtype: str, implementation: str, compiled: bool, **given: Any):
        self.dtype, self.implementation = getattr(torch, dtype), implementation
        self.compiled = compiled
        super().__init__(**given)

    def pack(self, layer: int, gate_up: Tensor, down: Tensor) -> Any:
        shape = self.shape
        config = MixtralConfig(
            hidden_size=shape.dim,
            intermediate_size=shape.width,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = self.implementation
        with torch.device("meta"):
            made = MixtralExperts(config)
        made.gate_up_proj = torch.nn.Parameter(gate_up.to(self.dtype), requires_grad=False)
        made.down_proj = torch.nn.Parameter(down.to(self.dtype), requires_grad=False)
        return torch.compile(made) if self.compiled else made

    def run(self, packed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return packed(x, ids, weights)


if __name__ == "__main__":
    serve(Transformers)
