"""The tokenizer: opened from a folder, or a byte-level BPE trained on the data."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from expertly.errors import ExpertlyError
from expertly.models.adapter_files import base_of
from expertly.models.configs import check_kinds
from expertly.models.template import check_template

END_OF_TEXT = "<|endoftext|>"


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, and never any code of it; of an adapter without one its base's.

    Raises E307 when there is none or it has no end-of-text token, E311 for a chat template that
    reaches where it must not, E301 for a pipe or folder in place of a file.
    """
    path = Path(folder)
    check_kinds(path)
    if not _has_tokenizer(path):
        path = base_of(path)
        check_kinds(path)
    if not _has_tokenizer(path):
        why = "no tokenizer in it" if path.is_dir() else "no such folder"
        fix = "name a folder with tokenizer.json, or leave it out to train one on the data"
        raise ExpertlyError("E307", str(path), why, fix=fix)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower
        why = " ".join(f"cannot be read ({error}".split())[:200] + ")"
        raise ExpertlyError("E307", str(path), why, fix="copy the tokenizer again") from error
    _check_templates(tokenizer, path)
    if tokenizer.eos_token_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise ExpertlyError("E307", str(path), "it has no end-of-text token", fix=fix)
    return tokenizer


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _check_templates(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raises E311 for the first of its chat templates that is refused; there may be several."""
    said = tokenizer.chat_template or {}
    templates = said if isinstance(said, dict) else {"default": said}
    for name, text in templates.items():
        check_template(str(text), f"{path}: chat template {name}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with one special token, the end of text; every string can be encoded."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens: one that a text spells out is only text."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return encoded["input_ids"]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that changes whenever the ids would."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    said = core.to_str() if core is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(said.encode("utf-8")).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files into a folder; wrap it in folders.save_folder."""
    tokenizer.save_pretrained(folder)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of some ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's ids, with the special tokens that the tokenizer itself puts before a text.

    An empty one begins where documents do, after an end-of-text token.
    """
    return tokenizer(prompt, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
