"""Open and save a model folder: stock Hugging Face files, checked before they are believed."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging as transformers_logging

from expertly.errors import ExpertlyError, nearest
from expertly.families import FAMILIES
from expertly.folders import read_json, write_json
from expertly.memory import is_out_of_memory
from expertly.models.attach import Attachment, attached
from expertly.models.build import auto_class
from expertly.models.configs import read_config
from expertly.models.experts import register_experts
from expertly.models.files import check_layers, check_manifest, read_headers
from expertly.models.policies import (
    attach_saved,
    read_policy,
    require_sayable,
    stock_form,
    write_policy,
)

_log = logging.getLogger(__name__)

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

_SMALL = 2**20  # parameters that cost nothing, needed or not
_MAY_OVERFLOW = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# what the floors above, which don't import transformers, call its types
Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase


def open_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    experts_implementation: str | None = None,
    device: str = "cpu",
    verify: bool = False,
) -> PreTrainedModel:
    """Open a model folder, with the routing policy that was saved with it attached.

    Experts run on our function unless another of transformers' implementations is named. verify:
    check every sha256 of its manifest first, where it has one. Raises E305 when it is no model
    folder, E306 for an encoder-decoder, E310 for pickled weights, E301 and E302 for damaged files.
    """
    model = load_weights(
        Path(path), dtype=dtype, experts_implementation=experts_implementation, verify=verify
    )
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
    verify: bool = False,
) -> PreTrainedModel:
    """The bare transformers model of a folder; a missing tensor is an error, never random.

    Takes and raises what open_model does.
    """
    config = open_config(folder)
    verified = _check_files(folder, config, hashes=verify)
    kind = {}
    if config.model_type in FAMILIES:
        kind["experts_implementation"] = _experts(experts_implementation)
    with _opening(folder), _quiet():
        opened: Any = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, and by name
            **kind,
        )
    model, info = opened
    _check_loaded(folder, info)
    if not verified:
        _log.warning("%s: no manifest, contents unverified", folder)
    _check_finite(folder, model)  # in any case: a save may have written them, hashes and all
    return model


def check_model(folder: Path, *, verify: bool) -> bool:
    """Check a folder as load_weights does, without opening its weights; False: no manifest."""
    return _check_files(folder, open_config(folder), hashes=verify)


def class_config(folder: Path) -> PretrainedConfig:
    """The folder's config, without running any code it brings. Raises E305, E301."""
    _refuse_code(folder, read_config(folder))
    with _opening(folder), _quiet():
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def open_config(folder: Path) -> PretrainedConfig:
    """The config of a folder that can be opened. Raises what class_config does, and E306."""
    config = class_config(folder)
    if config.model_type in FAMILIES and config.is_encoder_decoder:
        what, fix = f"model_type {config.model_type!r}", "open it with transformers, then attach"
        raise ExpertlyError("E306", what, "an encoder-decoder", fix=fix)
    return config


@contextmanager
def as_folder(config: Mapping[str, Any]) -> Iterator[Path]:
    """A config.json in a folder of its own for a while, which is how transformers reads one."""
    with TemporaryDirectory() as made:
        write_json(Path(made) / "config.json", dict(config))
        yield Path(made)


def skeleton(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The folder's model without its weights, on the meta device. Raises E305."""
    with _opening(folder), _quiet(), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    attachment: Attachment | None = None,
    allow_non_stock: bool = False,
) -> None:
    """Fill a folder with stock files that any loader reads; wrap it in folders.save_folder.

    An attached policy goes into config.json where its keys can say it, and beside the weights
    where they can't: then a stock loader computes another function. attachment None, or one that
    only looks: the one at work on the model, if any. Raises E204, before it writes anything, for
    a policy that stock keys can't say, unless allow_non_stock.
    """
    if attachment is None or attachment.policy is None:
        attachment = attached(model)
    policy = attachment.policy if attachment is not None else None
    config = model.config.to_dict()
    if policy is not None:
        require_sayable(config, policy, allow_non_stock=allow_non_stock)
    with _quiet():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if attachment is None or policy is None:
        return
    keys = stock_form(config, policy)
    if keys is None:
        write_policy(folder, attachment)
    else:
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **keys})


@contextmanager
def _quiet() -> Iterator[None]:
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


def _refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises E305 for a config that needs its folder's code, or that would overwrite a function."""
    kind = config["model_type"]
    if config.get("auto_map") and kind not in CONFIG_MAPPING:
        why = f"model_type {kind[:40]!r} comes with code of its own (auto_map), which is never run"
        fix = "name a model whose family transformers knows"
        raise ExpertlyError("E305", str(folder / "config.json"), why, fix=fix)
    for key in config:
        if callable(getattr(PretrainedConfig, key, None)):  # transformers sets any key
            why = f"{key} is the name of a function, expected the name of a value"
            fix = "correct config.json"
            raise ExpertlyError("E305", str(folder / "config.json"), why, fix=fix)


def _check_files(folder: Path, config: PretrainedConfig, *, hashes: bool) -> bool:
    """Whether a manifest agrees; headers are sound and every expert is there in any case."""
    verified = check_manifest(folder, hashes=hashes)
    tensors = read_headers(folder)
    check_layers(folder, read_config(folder), tensors)
    _check_count(folder, config, sum(tensor.weights for tensor in tensors))
    return verified


def _check_count(folder: Path, config: PretrainedConfig, there: int) -> None:
    """Raises E301 when config.json asks for far more numbers than the weights hold.

    Missing tensors and those of another shape are told by name later. But transformers makes
    random ones for them first, of any size: memory for them must not be asked for at all.
    """
    asked = skeleton(folder, config).num_parameters()
    if asked > 2 * there + _SMALL:
        why = f"config.json asks for {asked:,} parameters, the weights hold {there:,}"
        raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
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


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Raises E301 for NaN or infinity in the weights."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype not in _MAY_OVERFLOW or tensor.numel() == 0:
            continue
        # one pass without a temporary; a NaN comes through it
        if not all(end.isfinite() for end in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            why = f"{count} of {tensor.numel()} numbers in {name} are NaN or infinite"
            raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")


def _experts(name: str | None) -> str:
    """A name that transformers knows for its experts_implementation; E202 for any other."""
    known = {register_experts(), "eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()}
    if name is not None and name not in known:
        fix = nearest(name, known)
        raise ExpertlyError("E202", "experts_implementation", f"{name!r} is unknown", fix=fix)
    return name or register_experts()


@contextmanager
def _opening(folder: Path) -> Iterator[None]:
    """Turns what transformers raises for a bad folder into E305, in one line."""
    try:
        yield
    except _BAD_FOLDER as error:
        if is_out_of_memory(error):  # that is the machine's doing, no config.json helps
            raise
        said = " ".join(f"({type(error).__name__}: {error}".split())[:220]
        why = f"transformers cannot open it {said})"
        raise ExpertlyError("E305", str(folder), why, fix="correct config.json") from error
