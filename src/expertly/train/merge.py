"""Merge an adapter into its base, read from top to bottom: open, fold in, write, open again.

Nothing is left behind unless the logits agree at every step.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.data.config import Source
from expertly.data.sample import sample_rows
from expertly.errors import ExpertlyError
from expertly.folders import save_folder
from expertly.models.adapter_files import (
    base_marks,
    base_of,
    is_adapter_folder,
    load_adapter,
    tokenizer_folder,
)
from expertly.models.adapters import Wrapped, merge_adapter, wrapped
from expertly.models.loading import Model, Tokenizer, load_weights, save_model
from expertly.models.packed_loading import is_packed_folder
from expertly.models.policies import attach_saved, read_policy
from expertly.models.tokenizer import encode_batch, open_tokenizer
from expertly.receipts import Check, Receipt, fingerprint, versions, write

_TOKENS, _LENGTH = 512, 128
_LIMIT = 1e-5  # of the largest logit; float32 itself takes a quarter of it in a deep model

Say = Callable[[str], None]  # one line for the user


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What is merged into what."""

    adapter: str
    output_dir: str
    base: str = ""  # a model's folder; "": the one that the adapter names


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What was made."""

    folder: Path
    base: Path
    adapters: dict[str, int]  # weights that have changed, by part
    largest_logit_difference: float  # folded in, against beside the weights
    rounding_logit_difference: float  # by the dtype of the base, which is kept
    written_logit_difference: float  # opened again, against what was to be written
    largest_logit: float
    seconds: float


class _Job(NamedTuple):
    """What a merge works with."""

    adapter: Path
    base: Path
    tokenizer: Tokenizer
    ids: Tensor  # (rows, seq), text that the logits are compared on


def run(config: MergeConfig, say: Say) -> MergeResult:
    """Write the base with the adapter in its weights: all of config.output_dir, or nothing.

    Raises E101 when logits differ, E205 for a folder in the way, E202 for a packed base, E305 for
    what is no adapter, or one of another model, and what opening the two can raise.
    """
    started = time.perf_counter()
    job = _prepare(config)
    model = _open(job.base)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    load_adapter(model, job.adapter, base=job.base)
    parts, beside = wrapped(model), _logits(model.float(), job.ids)
    merge_adapter(model)
    folded, largest = _logits(model, job.ids), float(beside.abs().max())
    limit = max(1e-4, _LIMIT * largest)
    differs = [_checked("folded in", folded, beside, limit)]
    _cast(model, dtypes)
    kept = _logits(model.float(), job.ids)  # rounded, computed alike
    names = ", ".join(sorted({str(dtype) for dtype in dtypes.values()}))
    say(f"folded in: logits differ by {differs[0].figure:.2g}; writing {names}")

    def fill(folder: Path) -> None:
        _cast(model, dtypes)
        # any policy on it is its base's
        save_model(model, folder, tokenizer=job.tokenizer, allow_non_stock=True)
        model.to("meta")  # one model at a time
        written = _logits(_open(folder).float(), job.ids)
        differs.append(_checked("written", written, kept, limit))
        write(_receipt(job, parts, differs, largest), folder)

    folder = save_folder(Path(config.output_dir), fill)
    return MergeResult(
        folder=folder,
        base=job.base,
        adapters={row.part: row.weights for row in parts},
        largest_logit_difference=float(differs[0].figure or 0),
        rounding_logit_difference=float((kept - folded).abs().max()),
        written_logit_difference=float(differs[1].figure or 0),
        largest_logit=largest,
        seconds=time.perf_counter() - started,
    )


def _prepare(config: MergeConfig) -> _Job:
    """Read and check all inputs, before anything big is opened."""
    adapter = Path(config.adapter)
    if os.path.lexists(config.output_dir):
        raise ExpertlyError("E205", config.output_dir, "exists already", fix="name a new folder")
    if not is_adapter_folder(adapter):
        fix = "name a folder with adapter_config.json, such as a run's checkpoint"
        raise ExpertlyError("E305", config.adapter, "holds no adapter", fix=fix)
    base = Path(config.base) if config.base else base_of(adapter)
    if is_packed_folder(base):
        why, fix = "its weights are packed, and would be rounded again", "add --base ORIGINAL"
        raise ExpertlyError("E202", str(base), why, fix=fix)
    own = tokenizer_folder(adapter)
    tokenizer = open_tokenizer(own if own == adapter else base)
    encode = partial(encode_batch, tokenizer)
    sources, end = [Source(path="stdlib:code")], tokenizer.eos_token_id
    rows = sample_rows(sources, encode, end, tokens=_TOKENS, sequence_length=_LENGTH)
    ids = torch.cat([*rows.values()])
    return _Job(adapter, base, tokenizer, ids)


def _open(folder: Path) -> Any:
    """A model as it lies there, with the routing policy that was saved beside it."""
    model = load_weights(folder)
    saved = read_policy(folder)
    if saved is not None:
        attach_saved(model, saved)
    return model.eval()


def _cast(model: Model, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give weights the dtypes that files have; what no file holds, as rotary angles, stays."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


@torch.no_grad()
def _logits(model: Model, ids: Tensor) -> Tensor:
    """(rows, seq, vocab), float32."""
    return torch.cat([model(row[None], use_cache=False).logits.float() for row in ids])


def _checked(name: str, logits: Tensor, before: Tensor, limit: float) -> Check:
    """How far logits are from those before. Raises E101 where they should not be."""
    figure = float((logits - before).abs().max())
    if not figure <= limit:  # NaN is not
        why = f"the logits differ by {figure:.2g}, limit {limit:.2g}; nothing was written"
        raise ExpertlyError("E101", name, why, fix="report it with the model's name")
    return Check(f"largest logit difference, {name}", True, figure, limit)


def _receipt(job: _Job, parts: list[Wrapped], checks: list[Check], largest: float) -> Receipt:
    base: dict[str, Any] = {"path": str(job.base.resolve()), **base_marks(job.base)}
    return Receipt(
        job="merge",
        inputs={"adapter": fingerprint(job.adapter), "base": base},
        versions=versions("torch", "transformers", "peft", "safetensors"),
        changed={row.part: f"{row.weights} weights" for row in parts},
        checks=tuple(checks),
        figures={"largest_logit": largest, "tokens": job.ids.numel()},
    )
