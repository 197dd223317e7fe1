"""vLLM's engine for CPUs, bf16."""

import time
from typing import Any

from vllm import LLM, SamplingParams
from wire import serve


class Vllm:
    def __init__(self, folder: str, threads: int):
        self.model = LLM(
            folder,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=1,
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def round(self, tokens: list[int], prompt: int, setting: dict[str, Any]) -> dict[str, float]:
        """Prefill with one new token; decode is what more new tokens take beyond that."""
        one = self._seconds(tokens[:prompt], 1)
        more = len(tokens) - prompt
        return {"prefill": one, "decode": self._seconds(tokens[:prompt], more + 1) - one}

    def _seconds(self, prompt: list[int], new: int) -> float:
        wish = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, detokenize=False)
        started = time.perf_counter()
        self.model.generate({"prompt_token_ids": prompt}, wish, use_tqdm=False)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(Vllm)
