"""vLLM's engine for CPUs, in this process and with no more threads than it was given."""

import os
import time
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams  # it reads the environment
from wire import serve


class Vllm:
    """A model of a folder; eager: nothing compiled."""

    def __init__(self, folder: str, threads: int, dtype: str = "bfloat16", eager: bool = False):
        self.model = LLM(
            folder,
            dtype=dtype,
            enforce_eager=eager,
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

    def greedy(self, tokens: list[int], new: int, setting: dict[str, Any]) -> dict[str, list[int]]:
        wish = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        (found,) = self.model.generate({"prompt_token_ids": tokens}, wish, use_tqdm=False)
        return {"tokens": list(found.outputs[0].token_ids)}

    def _seconds(self, prompt: list[int], new: int) -> float:
        wish = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, detokenize=False)
        started = time.perf_counter()
        self.model.generate({"prompt_token_ids": prompt}, wish, use_tqdm=False)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(Vllm)
