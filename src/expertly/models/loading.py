"""Open and save a model folder: stock Hugging Face files, checked before they are believed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES, sizes
from expertly.folders import read_json, verify, write_json
from expertly.models.attach import Attachment
from expertly.models.experts import register_experts
from expertly.models.policies import attach_saved, read_policy, stock_form, write_policy

# what the floors above, which don't import transformers, call its types
Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase


def open_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    experts_implementation: str | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Open a model folder, with the routing policy that was saved with it attached.

    Experts run on our function unless another of transformers' implementations is named. Raises
    E305 when it is no model folder, E310 for pickled weights, E301 and E302 for damaged files.
    """
    model = load_weights(Path(path), dtype=dtype, experts_implementation=experts_implementation)
    model.to(torch.device(device))  # type: ignore[arg-type]
    saved = read_policy(Path(path))
    if saved is not None:
        attach_saved(model, saved)
    return model.eval()


def load_weights(
    folder: Path,
    *,
    dtype: torch.dtype | str = "auto",
    experts_implementation: str | None = None,
) -> PreTrainedModel:
    """The bare transformers model of a folder; a missing tensor is an error, never random."""
    config = open_config(folder)
    _check_files(folder)
    kind = {}
    if config.model_type in FAMILIES:
        kind["experts_implementation"] = experts_implementation or register_experts()
    with _quiet():
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **kind,
        )
    model, info = opened
    lost = sorted(str(key) for key in info["missing_keys"])
    if lost:
        why = f"{len(lost)} tensors missing, first {lost[0]}"
        raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")
    return model


def open_config(folder: Path) -> PretrainedConfig:
    """The folder's config, without running any code it brings. Raises E305, E202."""
    if not (folder / "config.json").is_file():
        why = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ExpertlyError("E305", str(folder), why, fix="name a Hugging Face model folder")
    raw = read_json(folder / "config.json")
    if raw.get("model_type") in FAMILIES:
        moe = sizes(raw)
        if moe.top_k > moe.num_experts:
            why = f"top_k {moe.top_k} with {moe.num_experts} experts"
            raise ExpertlyError("E305", str(folder / "config.json"), why, fix="correct config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        fix = "open a folder that transformers knows"
        raise ExpertlyError("E305", str(folder), why, fix=fix) from error


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    attachment: Attachment | None = None,
) -> None:
    """Fill a folder with stock files that any loader reads; wrap it in folders.save_folder.

    An attached policy goes into config.json where its keys can say it, and beside the weights
    where they can't: then a stock loader computes another function.
    """
    with _quiet():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if attachment is None or attachment.policy is None:
        return
    keys = stock_form(model.config.to_dict(), attachment.policy)
    if keys is None:
        write_policy(folder, attachment)
    else:
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **keys})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which end up in the middle of our own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _check_files(folder: Path) -> None:
    """Weights are there, are safetensors, and agree with the manifest's sizes if there is one."""
    verify(folder, hashes=False)
    if any(folder.glob("*.safetensors")):
        return
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        fix = "convert it to safetensors in a sandbox"
        raise ExpertlyError("E310", str(pickled[0]), "pickled weights can run code", fix=fix)
    raise ExpertlyError("E305", str(folder), "no *.safetensors in it", fix="name a model folder")
