"""ik_llama.cpp through ik-llama-cpp-python, built from source for this CPU."""

from typing import Any

from gguf_engine import GgufEngine, set_all
from ik_llama_cpp import _ctypes_api as ik
from wire import serve


class IkLlama(GgufEngine):
    """repack: weights in an order of its own for this CPU (-rtr), fp16 for the products' batch."""

    def __init__(self, folder: str, file: str, threads: int, repack: bool = True):
        super().__init__(ik, folder, file, threads, repack_tensors=repack, use_mmap=not repack)

    def model_params(self, **load: Any) -> Any:
        return set_all(ik.llama_model_default_params(), load)

    def context_params(self, flash: bool, fused: bool = True) -> Any:
        params = ik.llama_context_default_params()
        return set_all(params, {"flash_attn": flash, "fused_moe_up_gate": fused})

    def clear(self) -> None:
        ik.llama_kv_cache_clear(self.context)


if __name__ == "__main__":
    serve(IkLlama)
