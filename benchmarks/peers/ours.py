"""expertly: a folder opened at 4, 8 or 16 bits; prefill and decode as its engine does them."""

from typing import Any

import torch
from transformers import DynamicCache
from wire import serve

import expertly


class Ours:
    def __init__(self, folder: str, bits: int, threads: int, **options: Any):
        torch.set_num_threads(threads)
        self.model = expertly.open_model(folder, bits=bits, **options)
        self.cache: Any = None

    def set(self) -> None:
        self.cache = DynamicCache(config=self.model.config)  # the model lets it grow in steps

    def prefill(self, ids: list[int]) -> None:
        self._run(ids)

    def step(self, token: int) -> None:
        self._run([token])

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Any:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    @torch.inference_mode()
    def _run(self, ids: list[int]) -> int:
        out = self.model(
            input_ids=torch.tensor([ids]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(out.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(Ours)
