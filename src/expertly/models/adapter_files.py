"""An adapter's folder in PEFT's format: written, recognised, read, and put on its base.

Beside PEFT's two files lies expertly/base.json, which tells its base from another of the same make.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.folders import read_json, write_json
from expertly.models.adapters import layers_of, require_peft, require_seam

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = Path("expertly") / "base.json"
_PREFIX = "base_model.model."  # of every name in PEFT's file
_NAME = ".default."  # of the adapter, which files leave out
_SAMPLE = 2**20  # bytes at each end of a file of weights, which differ when any training was done
# what PEFT can say of an adapter and ours cannot do; with the value that asks for nothing
_REFUSED = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "lora_dropout": 0.0,
}


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> Path:
    """The model folder that an adapter is for; any other folder is its own.

    A relative path is looked for from here, then from the adapter. Raises E301 for a damaged
    config, E305 when the base is not there.
    """
    if not is_adapter_folder(folder):
        return folder
    said = str(read_json(folder / CONFIG).get("base_model_name_or_path"))
    for place in (Path(said), folder / said):
        if place.is_dir():
            return place
    why = f"its base {said!r:.200} is not here"
    fix = f"correct base_model_name_or_path in its {CONFIG}"
    raise ExpertlyError("E305", str(folder), why, fix=fix)


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model or adapter lies: an adapter's may be its base's."""
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return folder if own else base_of(folder)


def save_adapter(
    model: PreTrainedModel, folder: Path, *, base: Path, trained_routers: bool = False
) -> None:
    """Fill a folder with what PEFT reads; wrap it in folders.save_folder.

    trained_routers: routers learn by themselves, and are written whole (PEFT's modules_to_save).
    """
    said: Any = model.peft_config["default"]
    routers = _routers(model) if trained_routers else {}
    tensors = {
        name.replace(_NAME, "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    } | routers
    plain = {_PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    said.base_model_name_or_path = str(base)
    said.modules_to_save = sorted(_ends(routers)) or None
    said.inference_mode = True
    said.target_modules = sorted(said.target_modules)
    said.target_parameters = sorted(said.target_parameters or [])
    said.save_pretrained(folder)
    (folder / BASE).parent.mkdir(exist_ok=True)
    write_json(folder / BASE, base_marks(base))


def load_adapter(model: PreTrainedModel, folder: Path, *, base: Path) -> None:
    """Put the adapter of a folder on the model of another, its base.

    Raises E207 without PEFT, E301 for damaged files, E305 for an adapter of another model, E306
    for a kind of adapter that is not read, E310 for pickled weights.
    """
    require_peft()
    from expertly.models.peft_layers import inject, lora_config

    said = read_json(folder / CONFIG)
    _require_known(folder, said)
    tensors = _tensors(folder)
    _require_base(folder, base)
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules")
    layers = layers_of(model)
    try:
        config = lora_config(
            **{key: said[key] for key in keys if said.get(key) is not None},
            target_modules=said.get("target_modules") or [],
            target_parameters=said.get("target_parameters") or [],
        )
        require_seam(model, layers, config.target_parameters or [])
        inject(model, layers, config)
    except (ValueError, TypeError) as error:
        raise _of_another(folder, base, str(error)) from error
    _fill(model, tensors, folder, base)


def base_marks(base: Path) -> dict[str, Any]:
    """What tells a base from another: its config, and of each file of weights size and ends."""
    files = sorted(base.glob("*.safetensors"))
    config = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    return {"config": config, "weights": {file.name: _mark(file) for file in files}}


def _mark(file: Path) -> list[Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_SAMPLE))
        stream.seek(max(0, size - _SAMPLE))
        digest.update(stream.read())
    return [size, digest.hexdigest()]


def _require_base(folder: Path, base: Path) -> None:
    if (folder / BASE).is_file() and read_json(folder / BASE) != base_marks(base):
        raise _of_another(folder, base, "its base had other weights")


def _of_another(folder: Path, base: Path, why: str) -> ExpertlyError:
    said = " ".join(why.split())[:160]
    return ExpertlyError(
        "E305",
        str(folder),
        f"is no adapter of {base} ({said})",
        fix="name the model that it was made for",
    )


def _require_known(folder: Path, said: Mapping[str, Any]) -> None:
    """Raises E306 for a kind of adapter that is not read."""
    wrong = [f"{k}={said[k]!r:.40}" for k, usual in _REFUSED.items() if said.get(k, usual) != usual]
    if said.get("peft_type") != "LORA":
        wrong = [f"peft_type={said.get('peft_type')!r:.40}"]
    if wrong:
        fix = "merge it with PEFT, and open the result"
        raise ExpertlyError("E306", str(folder), f"{wrong[0]} is not read", fix=fix)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The file's tensors by the names of parameters in a model."""
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            fix = "save it as safetensors with PEFT"
            raise ExpertlyError("E310", str(folder / PICKLE), "is a pickle", fix=fix)
        raise ExpertlyError("E301", str(folder / WEIGHTS), "is missing", fix="copy it again")
    try:
        read = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        why = f"cannot be read ({error})"[:200]
        raise ExpertlyError("E301", str(folder / WEIGHTS), why, fix="copy it again") from error
    if wrong := [name for name, t in read.items() if not t.isfinite().all()]:
        why = f"{wrong[0]} has numbers that are NaN or infinite"
        raise ExpertlyError("E301", str(folder / WEIGHTS), why, fix="copy it again")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in read.items()}


@torch.no_grad()
def _fill(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path, base: Path) -> None:
    """Copy every tensor to its place. Raises E305 for one that has none, and a place left empty."""
    places: dict[str, Tensor] = {
        name.replace(_NAME, "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    missing = sorted(places.keys() - tensors.keys())
    places |= {name: p for name, p in _routers(model).items() if name in tensors}
    if missing or (unknown := sorted(tensors.keys() - places.keys())):
        name = missing[0] if missing else unknown[0]
        raise _of_another(folder, base, f"{name} is {'missing' if missing else 'unknown'}")
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(places[name].shape)}"
            raise _of_another(folder, base, f"{name} is {shapes}")
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def _routers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The routers' own parameters by name, an adapter around or in them aside."""
    bare = {id(layer.router): None for layer in layers_of(model)}
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if id(module) in bare
        for leaf, parameter in module.named_parameters()
        if ".lora_" not in leaf
    }


def _ends(names: Mapping[str, Tensor]) -> set[str]:
    """The modules of parameters, by the last two parts of their names: mlp.gate."""
    return {".".join(name.split(".")[:-1][-2:]) for name in names}
