"""Write a model folder as GGUF, and quantise it, with llama.cpp's own converter and quantiser.

Run by llama.cpp's environment: python gguf_files.py SOURCE FOLDER OUT TYPE ...
SOURCE: the llama.cpp folder inside llama-cpp-python's sdist. TYPE: f32 or bf16, which the converter
writes, or q4_0, q8_0, ..., made from bf16; OUT gets one TYPE.gguf each. The converter knows
tokenizers by a hash of what they make of some text, and stops at any other: it is told that this
one splits text as GPT-2's does.
"""

import ctypes
import os
import runpy
import sys
from pathlib import Path

from llama_cpp import llama_cpp


def main() -> None:
    source, folder, out, *kinds = sys.argv[1:]
    for kind in kinds:
        target = Path(out) / f"{kind}.gguf"
        if target.exists():
            continue
        if kind in ("f32", "bf16"):
            convert(source, folder, target)
        else:
            quantize(target.with_name("bf16.gguf"), target, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")


def convert(source: str, folder: str, target: Path) -> None:
    sys.path[:0] = [source, f"{source}/gguf-py"]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda model, tokenizer: "gpt-2"
    sys.argv = ["convert", folder, "--outfile", str(target), "--outtype", target.stem]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


def quantize(source: Path, target: Path, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, kind), os.cpu_count()
    paths = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)):
        raise SystemExit(f"{source} cannot be quantised")


if __name__ == "__main__":
    main()
