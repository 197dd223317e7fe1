"""In which format a checkpoint has its parts, as its config.json says."""

from collections.abc import Mapping
from typing import Any

from expertly.plan.shape import PARTS

# what quantizers reach; routers, norms, embeddings and head stay as they are
QUANTISABLE = ("attention", "experts", "shared experts", "dense layers")
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_METHODS = {"fp8": "fp8", "fbgemm_fp8": "fp8", "finegrained_fp8": "fp8", "mxfp4": "mxfp4"}


def stored_as(config: Mapping[str, Any]) -> dict[str, str]:
    """Part -> the name of its format."""
    said = config.get("dtype") or config.get("torch_dtype")
    base = _DTYPES.get(str(said).removeprefix("torch."), "bf16")
    formats = dict.fromkeys(PARTS, base)
    quantized = _quantized(config.get("quantization_config"))
    if quantized is not None:
        # MXFP4 as gpt-oss has it: the experts alone
        parts = ("experts",) if quantized == "mxfp4" else QUANTISABLE
        formats.update(dict.fromkeys(parts, quantized))
    return formats


def _quantized(said: Any) -> str | None:
    """The format that a quantization_config names; None for none, or one that is not known."""
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method")
    if method == "bitsandbytes":
        return "int4" if said.get("load_in_4bit") else "int8"
    bits = said.get("bits")
    if isinstance(bits, int) and bits in (2, 3, 4, 8):
        return f"int{bits}"
    return _METHODS.get(str(method))
