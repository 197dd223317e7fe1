"""transformers, with any of its experts implementations, in fp32 or bf16."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from wire import serve


class Transformers:
    """A model of a folder as transformers runs it.

    dtype: float32 or bfloat16. length: tokens that a cache of fixed size has room for.
    """

    def __init__(self, folder: str, dtype: str, threads: int, length: int = 1024):
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model.eval()
        self.length = length
        self.compiled: Any = torch.compile(self.model)  # compiles when first called
        self.cache: Any = None
        self.setting: dict[str, Any] = {}

    def set(self, prefill: str, decode: str, compiled: bool = False) -> None:
        """Experts implementations of both phases, and whether decode steps run compiled."""
        self.setting = {"prefill": prefill, "decode": decode, "compiled": compiled}
        # compiled code is made anew for every length of a cache that grows
        fixed = StaticCache(config=self.model.config, max_cache_len=self.length)
        self.cache = fixed if compiled else DynamicCache(config=self.model.config)

    def prefill(self, ids: list[int]) -> None:
        self.model.set_experts_implementation(self.setting["prefill"])
        self._run(self.model, ids)
        self.model.set_experts_implementation(self.setting["decode"])

    def step(self, token: int) -> None:
        self._run(self.compiled if self.setting["compiled"] else self.model, [token])

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Any:
        self.model.set_experts_implementation(self.setting["prefill"])
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    @torch.inference_mode()
    def _run(self, forward: Any, ids: list[int]) -> int:
        out = forward(
            input_ids=torch.tensor([ids]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(out.logits[0, -1].argmax())  # reading it waits for the step's end


if __name__ == "__main__":
    serve(Transformers)
