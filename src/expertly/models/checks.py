"""Opening a model folder through transformers: its errors in one line, its result checked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from expertly.errors import ExpertlyError
from expertly.memory import is_out_of_memory

# what transformers raises for a folder that is not as it expects; its own bugs among them
_BAD_FOLDER = (
    StrictDataclassError,
    SafetensorError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    OSError,
)

_MAY_OVERFLOW = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which end up in the middle of our own, and reports.

    What a report says about missing tensors becomes an error of ours, in one line.
    """
    shown, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Turns what transformers raises for a bad folder into E305, in one line."""
    try:
        yield
    except _BAD_FOLDER as error:
        if is_out_of_memory(error):  # that is the machine's doing, no config.json helps
            raise
        said = " ".join(f"({type(error).__name__}: {error}".split())[:220]
        why = f"transformers cannot open it {said})"
        raise ExpertlyError("E305", str(folder), why, fix="correct config.json") from error


def check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Raises E301 when weights and config.json are not of the same model."""
    wrong = {
        "are missing": info["missing_keys"],
        "have another shape than config.json says": info["mismatched_keys"],
        "have no place in the model of config.json": info["unexpected_keys"],
    }
    for what, keys in wrong.items():
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            why = f"tensors {what}: {len(names)}, first {names[0]}"
            raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")


def check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Raises E301 for NaN or infinity in the weights."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype not in _MAY_OVERFLOW or tensor.numel() == 0:
            continue
        # one pass without a temporary; a NaN comes through it
        if not all(end.isfinite() for end in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            why = f"{count} of {tensor.numel()} numbers in {name} are NaN or infinite"
            raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")
