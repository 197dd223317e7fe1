"""Open and save a model folder: stock Hugging Face files, checked before they are believed."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertly.errors import ExpertlyError, nearest
from expertly.families import FAMILIES
from expertly.folders import read_json, write_json
from expertly.models.adapter_files import base_of, load_adapter
from expertly.models.attach import Attachment, attached
from expertly.models.build import auto_class
from expertly.models.checks import check_finite, check_loaded, opening, quiet
from expertly.models.configs import read_config
from expertly.models.experts import EXPERTS, register_experts
from expertly.models.files import check_layers, check_manifest, read_headers
from expertly.models.lean import make_lean
from expertly.models.packed_loading import (
    chosen_precision,
    finish_packing,
    load_packed,
    packed_schemes,
)
from expertly.models.packed_saving import save_packed
from expertly.models.packing import is_packed
from expertly.models.policies import (
    attach_saved,
    read_policy,
    require_sayable,
    stock_form,
    write_policy,
)

_log = logging.getLogger(__name__)

_SMALL = 2**20  # parameters that cost nothing, needed or not

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
    bits: int | None = None,
    group_size: int | None = None,
) -> PreTrainedModel:
    """Open a model folder, with the routing policy that was saved with it attached.

    Of an adapter's folder the base, with the adapter beside its weights. Experts run on our
    function unless another of transformers' implementations is named. verify: check every sha256
    of its manifest first, where it has one. bits: pack the weights while they load, 4, 8 or 16, in
    groups of 32 (if not said), 64 or 128; a packed folder opens packed without. device: "cpu", or
    "cuda" where nothing is packed. Raises E305 when it is no model folder, E306 for an
    encoder-decoder or experts that cannot be packed, E310 for pickled weights, E301 and E302 for
    damaged files, E202 for options that do not fit.
    """
    folder, base = Path(path), base_of(Path(path))
    model = load_weights(
        base,
        dtype=dtype,
        experts_implementation=experts_implementation,
        verify=verify,
        bits=bits,
        group_size=group_size,
        device=device,
    )
    if base != folder:
        load_adapter(model, folder, base=base)
    model.to(torch.device(device))  # type: ignore[arg-type]
    if base == folder and is_packed(model):
        make_lean(model.eval())
    saved = read_policy(base)
    if saved is not None:
        attach_saved(model, saved)
    return model.eval()


def load_weights(
    folder: Path,
    *,
    dtype: torch.dtype | str = "auto",
    experts_implementation: str | None = None,
    verify: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """The bare transformers model of a folder, on the CPU; a missing tensor is an error, never
    random.

    Takes and raises what open_model does. device: where it is to go; packed weights stay.
    """
    kind = _device_type(device)
    schemes = packed_schemes(folder)
    precision = chosen_precision(folder, bits, group_size, schemes)
    config = open_config(folder)
    verified = _check_files(folder, config, hashes=verify)
    packs = precision is not None or bool(schemes)
    if packs:
        _require_ours(experts_implementation, kind)
    options: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True}  # told by name
    if config.model_type in FAMILIES:
        options["experts_implementation"] = _experts(experts_implementation)
    with opening(folder), quiet():
        if packs:
            made = skeleton(folder, config)
            model, info = load_packed(
                folder, type(made), made.config, precision, schemes, **options
            )
        else:
            model, info = _load_stock(folder, config, **options)
    check_loaded(folder, info)
    if packs:
        finish_packing(model)
    if not verified:
        _log.warning("%s: no manifest, contents unverified", folder)
    check_finite(folder, model)  # in any case: a save may have written them, hashes and all
    return model


def _load_stock(
    folder: Path, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    opened: Any = auto_class(config).from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return opened


def check_model(folder: Path, *, verify: bool) -> bool:
    """Check a folder as load_weights does, without opening its weights; False: no manifest."""
    return _check_files(folder, open_config(folder), hashes=verify)


def class_config(folder: Path) -> PretrainedConfig:
    """The folder's config, without running any code it brings. Raises E305, E301."""
    _refuse_code(folder, read_config(folder))
    with opening(folder), quiet():
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
    with opening(folder), quiet(), torch.device("meta"):
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
    only looks: the one at work on the model, if any. Packed weights of 4 and 8 bits are written as
    compressed-tensors' pack-quantized, of 16 bits as any others, and take the place of a model that
    the folder held. Raises, before it writes anything, E204 for a policy that stock keys can't say,
    unless allow_non_stock; E306 for packed weights that the format can't say.
    """
    if attachment is None or attachment.policy is None:
        attachment = attached(model)
    policy = attachment.policy if attachment is not None else None
    config = model.config.to_dict()
    if policy is not None:
        require_sayable(config, policy, allow_non_stock=allow_non_stock)
    keys = {} if policy is None else stock_form(config, policy)
    with quiet():
        if is_packed(model):
            save_packed(model, folder, keys or {})
        else:
            model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if attachment is not None and keys is None:
        write_policy(folder, attachment)
    if keys:
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **keys})


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


def _experts(name: str | None) -> str:
    """A name that transformers knows for its experts_implementation; E202 for any other."""
    known = {register_experts(), "eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()}
    if name is not None and name not in known:
        fix = nearest(name, known)
        raise ExpertlyError("E202", "experts_implementation", f"{name!r} is unknown", fix=fix)
    return name or register_experts()


def _device_type(device: str) -> str:
    """cpu, cuda, ..; E202 for a name that torch does not know."""
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        why = f"torch knows no {device!r:.40}"
        raise ExpertlyError("E202", "device", why, fix="write cpu or cuda") from error


def _require_ours(experts_implementation: str | None, device: str) -> None:
    """Raises E202 for options that packed weights rule out."""
    if experts_implementation not in (None, EXPERTS):
        why = f"{experts_implementation!r} cannot run packed weights"
        fix = f"leave it out, or write {EXPERTS}"
        raise ExpertlyError("E202", "experts_implementation", why, fix=fix)
    if device != "cpu":
        why = f"packed weights run on the CPU, not on {device!r}"
        raise ExpertlyError("E202", "device", why, fix="leave it out, or open without bits")
