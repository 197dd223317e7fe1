"""llama.cpp through llama-cpp-python, built from source for this CPU."""

from typing import Any

from gguf_engine import GgufEngine, set_all
from llama_cpp import llama_cpp
from wire import serve


class LlamaCpp(GgufEngine):
    """repack: weights in an order of its own for this CPU, as it does by default."""

    def __init__(self, folder: str, file: str, threads: int, repack: bool = True):
        super().__init__(llama_cpp, folder, file, threads, use_extra_bufts=repack)

    def model_params(self, **load: Any) -> Any:
        return set_all(llama_cpp.llama_model_default_params(), load)

    def context_params(self, flash: bool, cache: str = "F16") -> Any:
        """cache: the type of keys and values, F16 by default, or F32."""
        kind = getattr(llama_cpp, f"GGML_TYPE_{cache}")
        wanted = {"flash_attn_type": int(flash), "type_k": kind, "type_v": kind}
        return set_all(llama_cpp.llama_context_default_params(), wanted)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


if __name__ == "__main__":
    serve(LlamaCpp)
