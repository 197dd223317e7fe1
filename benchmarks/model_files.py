"""One model with random weights at real sizes, as every engine wants it: a folder, and GGUF files.

Made once per folder; delete the folder to make it anew.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GGUF = ("bf16", "q8_0", "q4_0")
_CONVERT = Path(__file__).with_name("peers") / "gguf_files.py"


def make_folder(config: dict[str, Any], folder: Path) -> None:
    """Random bf16 weights of a config.json with a tokenizer, in a process of its own."""
    if (folder / "tokenizer.json").exists():
        return
    subprocess.run(
        [sys.executable, __file__, str(folder)], input=json.dumps(config), text=True, check=True
    )


def make_gguf(peers: Path, folder: Path, out: Path, kinds: Sequence[str] = GGUF) -> str | None:
    """The GGUF files of a folder; one line that says why there are none, else None.

    kinds: what is quantised comes after bf16, of which it is made. llama.cpp's converter comes
    with the sdist of llama-cpp-python, unpacked beside its environment.
    """
    if all((out / f"{kind}.gguf").exists() for kind in kinds):
        return None
    python = peers / "llama/bin/python"
    source = peers / "llama/sdist/vendor/llama.cpp"
    if not python.exists() or not source.exists():
        return f"no GGUF: {source} or {python} is missing"
    command = [python, _CONVERT, source, folder, out, *kinds]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no GGUF: {done.stderr.strip().splitlines()[-1]}"


def random_tokenizer(size: int) -> Any:
    """A tokenizer with so many tokens: bytes, and pairs of bytes in alphabetical order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: size - len(letters)]
    words = [*letters, *(a + b for a, b in pairs)]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def _make(folder: str) -> None:
    import torch

    from expertly.bench.random_model import random_model

    config = json.load(sys.stdin)
    random_model(config, torch.bfloat16).save_pretrained(folder)
    random_tokenizer(config["vocab_size"]).save_pretrained(folder)


if __name__ == "__main__":
    _make(sys.argv[1])
