"""Write with a model: the prompt in one call, then one call per token, as lean as they can be.

Any transformers decoder will do: its own cache, its own forward. What its generation_config says
about ends and repetition is followed; how tokens are chosen is the caller's to say.
"""

import inspect
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertly.engine.sampler import Sampling, check_sampling, choose, penalized
from expertly.errors import ExpertlyError
from expertly.models.cache import growing

_log = logging.getLogger(__name__)

# what else a generation_config.json may ask for that changes which tokens come
_UNUSED = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_new_tokens",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
)


def generate_ids(model: Any, prompt: list[int], sampling: Sampling) -> list[int]:
    """Token ids that a transformers model puts after the prompt's, up to its end of text."""
    return list(stream_ids(model, prompt, sampling))


@torch.inference_mode()
def stream_ids(
    model: Any, prompt: list[int], sampling: Sampling, ends: frozenset[int] = frozenset()
) -> Iterator[int]:
    """The same ids, each as soon as it is chosen; the end of text is the last.

    ends: tokens that end it besides those of the model's generation_config. The seed settles them,
    and torch's own generator is not touched. Greedy ones are transformers'
    generate(do_sample=False)'s. Raises E202 for a prompt without tokens and for settings that say
    nothing.
    """
    check_sampling(sampling)
    if not prompt:
        raise ExpertlyError("E202", "prompt", "it has no tokens", fix="write at least one")
    said = model.generation_config
    ends, penalty = ends | _ends(said), said.repetition_penalty or 1.0
    _tell_unused(said)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    placed = "position_ids" in inspect.signature(model.forward).parameters
    seen, cache = list(prompt), None
    new = torch.tensor([prompt], device=device)
    for _ in range(sampling.max_new_tokens):
        places = torch.arange(len(seen) - new.shape[1], len(seen), device=device)[None]
        logits, cache = _step(model, new, cache, {"position_ids": places} if placed else {})
        token = choose(penalized(logits, seen, penalty), sampling, generator)
        yield token
        if token in ends:
            return
        seen.append(token)
        new = torch.tensor([[token]], device=device)


class Pace:
    """Token ids passed on, and how fast they came."""

    def __init__(self, ids: Iterator[int], prompt_tokens: int):
        self._ids, self.prompt_tokens, self.new_tokens = ids, prompt_tokens, 0
        self._started = self._first = self._last = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        self._started = time.perf_counter()
        for token in self._ids:
            self._last = time.perf_counter()
            if self.new_tokens == 0:
                self._first = self._last
            self.new_tokens += 1
            yield token

    @property
    def prefill(self) -> float:
        """Tokens of the prompt per second, up to the first new one."""
        return self.prompt_tokens / max(self._first - self._started, 1e-9)

    @property
    def decode(self) -> float | None:
        """New tokens per second, of those behind the first; None: there are none."""
        count = self.new_tokens - 1
        return count / max(self._last - self._first, 1e-9) if count > 0 else None


def _step(model: Any, new: Tensor, cache: Any, places: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Logits (vocab,) behind new tokens (1, tokens), and the cache with them in it.

    places: the tokens' positions, where the model takes them. A model that sees would otherwise
    count on from the images of an earlier call.
    """
    if cache is None:
        out = model(input_ids=new, use_cache=True, logits_to_keep=1, **places)
    else:
        out = model(input_ids=new, past_key_values=cache, use_cache=True, **places)
    return out.logits[0, -1], growing(out.past_key_values)


def _ends(said: Any) -> frozenset[int]:
    """The ids that end a text."""
    ends = said.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def _tell_unused(said: Any) -> None:
    asked = [name for name in _UNUSED if getattr(said, name, None)]
    if asked:
        _log.warning("generation_config: %s not followed", ", ".join(asked))
