"""Whether a model keeps texts apart that share a row, when positions begin at 0 in each of them.

transformers' masks do so by the positions alone, but not every family hands these on to its masks
(gpt_oss), and recurrences and convolutions run on through a row.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LENGTH = 12  # tokens of each text
_ALIKE = 0.05  # of the logits' norm; rounding in bfloat16 stays below it, what leaks is above


@torch.inference_mode()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Try it: a text behind another must have the logits that it has alone."""
    embedding: Any = model.get_input_embeddings()
    device, vocab = embedding.weight.device, embedding.num_embeddings
    places = torch.arange(_LENGTH, device=device)
    first, second = 3 * places % vocab, (7 * places + 1) % vocab
    was_training = model.training
    model.eval()
    try:
        alone = _logits(model, second, places)
        behind = _logits(model, torch.cat([first, second]), places.repeat(2))[_LENGTH:]
    finally:
        model.train(was_training)
    return bool((behind - alone).norm() <= _ALIKE * alone.norm())


def _logits(model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
    """Of one row (tokens,): (tokens, vocab) in float32."""
    out = model(input_ids=ids[None], position_ids=places[None], use_cache=False)
    return out.logits[0].float()
