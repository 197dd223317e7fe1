"""Write text with a model: transformers' own generate, with the settings people know."""

from typing import Any, NamedTuple

import torch


class Sampling(NamedTuple):
    """How the next token is chosen; temperature 0 takes the most likely one."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@torch.inference_mode()
def generate_ids(model: Any, prompt: list[int], sampling: Sampling) -> list[int]:
    """Token ids that a transformers model puts after the prompt's, up to its end of text."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **_settings(sampling))
    return out[0, len(prompt) :].tolist()


def _settings(sampling: Sampling) -> dict:
    limit = {"max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature == 0:
        return {**limit, "do_sample": False}
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {**limit, **chosen, "do_sample": True}
