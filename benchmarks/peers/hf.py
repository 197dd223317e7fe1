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
        self.top = -1
        self.setting: dict[str, Any] = {}

    def set(self, prefill: str = "", decode: str = "", compiled: bool = False) -> None:
        """Experts implementations of both phases ("": its own), and whether decode is compiled."""
        self.setting = {"prefill": prefill, "decode": decode, "compiled": compiled}
        # compiled code is made anew for every length of a cache that grows
        fixed = StaticCache(config=self.model.config, max_cache_len=self.length)
        self.cache = fixed if compiled else DynamicCache(config=self.model.config)

    def prefill(self, ids: list[int]) -> None:
        self._use("prefill")
        self._run(self.model, ids)
        self._use("decode")

    def step(self, token: int) -> None:
        self._run(self.compiled if self.setting["compiled"] else self.model, [token])

    def best(self) -> int:
        return self.top

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Any:
        self._use("prefill")
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    @torch.inference_mode()
    def _run(self, forward: Any, ids: list[int]) -> None:
        out = forward(
            input_ids=torch.tensor([ids]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.top = int(out.logits[0, -1].argmax())  # reading it waits for the step's end

    def _use(self, phase: str) -> None:
        if self.setting[phase]:
            self.model.set_experts_implementation(self.setting[phase])


if __name__ == "__main__":
    serve(Transformers)
