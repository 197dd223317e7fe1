"""Balancing without a loss: move each expert's selection bias against its load."""

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """One step of DeepSeek-V3's auxiliary-loss-free balancing, in place (section 2.1.2).

    bias: (experts,) float32; counts: (experts,) assignments of the whole batch of one optimizer
    step, over all micro-batches and ranks. Overloaded experts lose `rate`, underloaded gain it.
    """
    load = counts.to(bias)
    bias.add_(torch.sign(load.mean() - load), alpha=rate)
