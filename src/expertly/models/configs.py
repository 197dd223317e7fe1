"""A folder's config.json, checked before anything is built from it.

First step of opening a folder. Every value that could hang transformers, run code or turn logits
into NaN is refused here with its name and what is allowed; the rest is transformers' own to check.
Needs neither torch nor transformers.
"""

import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError
from expertly.families import decoder, family_of, first_of, said_by_words
from expertly.family_row import Family
from expertly.folders import checkpoints, read_json

_LONGEST = 16 * 2**20  # bytes of a config.json
_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")  # what a folder must not be called
# Whole numbers, by key: the least and the largest that is not a typing error. transformers itself
# hangs on 2**63 layers, and on as many labels.
_WHOLE = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), (1, 10_000)),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "num_labels"), (1, 2**20)),
    "vocab_size": (1, 2**27),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), (1, 2**16)
    ),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), (1, 2**40)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), (1, 2**20)),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), (0, 2**16)),
    "num_nextn_predict_layers": (0, 2**16),
}
_LARGEST_MOE = 2**20
# Real numbers, by key: a root of a negative or a division by zero ends in NaN.
_REAL = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (0.0, 1.0)),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout"), (0.0, 1.0)),
    "rope_theta": (1.0, 1e12),
    "routed_scaling_factor": (1e-3, 1e3),
    "router_aux_loss_coef": (0.0, 1e3),
    "router_jitter_noise": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "partial_rotary_factor": (1e-3, 1.0),
}
# of the scales and frequencies that rope_parameters hold besides those above
_ROPE = (0.0, 1e12)
_DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")
_ADAPTER = "adapter_config.json"  # PEFT's, in a folder without a model


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it stands.

    Raises E305 for a folder without or with an impossible value in it, E301 for a file that is
    none, or too long, or no JSON object.
    """
    check_kinds(folder)
    file = folder / "config.json"
    if not file.is_file():
        why = "no config.json in it" if folder.is_dir() else "no such folder"
        why = "it holds an adapter, and no model" if (folder / _ADAPTER).is_file() else why
        raise ExpertlyError("E305", str(folder), why, fix=_name_instead(folder))
    return read_config_file(file)


def read_config_file(file: Path) -> dict[str, Any]:
    """A config.json, whatever its name. Raises E301 and E305 as read_config does."""
    if (size := file.stat().st_size) > _LONGEST:
        why = f"{size} bytes, more than {_LONGEST}"
        raise ExpertlyError("E301", str(file), why, fix="copy the file again")
    config = read_json(file)
    check_values(config, str(file))
    return config


def check_values(config: dict[str, Any], what: str) -> None:
    """Raises E305 for an impossible value in a config, which is called `what`."""
    for why in _impossible(config):
        raise ExpertlyError("E305", what, why, fix="correct config.json")


def check_kinds(folder: Path) -> None:
    """Raises E301 for a pipe, a device or a folder where a file should be; reads none of them.

    Links are followed, as the Hub's own cache is made of them.
    """
    found = [*folder.glob("*"), *folder.glob("expertly/*")] if folder.is_dir() else []
    for path in found:
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing: missing, should somebody want it
            continue
        misnamed = stat.S_ISDIR(mode) and path.suffix in _FILES
        if misnamed or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            why = "is a folder, not a file" if misnamed else "is a pipe or device, not a file"
            raise ExpertlyError("E301", str(path), why, fix="copy the file again")


def _name_instead(folder: Path) -> str:
    """What to do about a folder without a model: download it, or name the one that was meant."""
    name = folder.as_posix()
    if not folder.parent.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return f"hf download {name} --local-dir DIR, then name DIR"
    if (folder / _ADAPTER).is_file():
        return "name its base, or make a model of both with expertly merge"
    kinds = ("config.json", _ADAPTER)
    saved = [path for path in checkpoints(folder) if any((path / kind).is_file() for kind in kinds)]
    if saved:
        return f"name {saved[-1]}"
    return "name a Hugging Face model folder"


def _impossible(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a config's values, each with what is allowed."""
    if not isinstance(config.get("model_type"), str):
        said = repr(config["model_type"])[:40] if "model_type" in config else "missing"
        yield f"model_type is {said}, expected the name of a family"
        return
    yield from _code(config)
    yield from _impossible_sizes(config)
    if row := family_of(config):
        inner = dict(decoder(config))
        if row.nested:
            yield from _impossible_sizes({"model_type": row.name, **inner})
        yield from _impossible_experts(inner, row)


def _impossible_sizes(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the values that any model has."""
    unused = {
        "sliding_window": config.get("use_sliding_window") is False,
        "head_dim": config.get("qk_rope_head_dim") == 0,  # latent attention without positions
    }
    for key, (least, largest) in _WHOLE.items():
        if config.get(key) is not None and not unused.get(key):
            yield from _not_whole(config, key, least, largest)
    yield from _not_real(config, _REAL)
    yield from _contradictions(config)


def _contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """Values of a wrong kind, or sound ones that do not go together."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        yield f"rope_parameters is {repr(rope)[:40]}, expected an object"
        return
    for name, layers in {"": rope, **rope}.items():  # some families have one object per layer type
        if isinstance(layers, dict):
            rest = {key: _ROPE for key, value in layers.items() if _is_number(value)}
            yield from _not_real(layers, {**rest, **_REAL}, f"rope_parameters.{name}".rstrip("."))
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str) and config[key].removeprefix("torch.") not in _DTYPES:
            yield f"{key} is {config[key][:40]!r}, expected one of {', '.join(_DTYPES)}"
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        yield f"num_key_value_heads is {shared}, expected a divisor of {heads} attention heads"
    if config["model_type"] in ("deepseek_v2", "deepseek_v3"):
        yield from _latent_contradictions(config)


def _latent_contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """Sizes of DeepSeek's latent attention that are said twice, and differ."""
    for key, other in (
        ("num_key_value_heads", "num_attention_heads"),
        ("head_dim", "qk_rope_head_dim"),
    ):
        said, meant = config.get(key), config.get(other)
        if said and meant and said != meant:
            yield f"{key} is {said}, expected {meant} as {other} is"


def _code(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that would have code or weights fetched from elsewhere, at any depth."""
    if config.get("transformers_weights") is not None:
        yield "transformers_weights names other weights than the folder's own, expected none"
    level: list[Any] = [config]
    while level:  # a loop: a recursion ends before the nesting that JSON allows
        value = level.pop()
        if isinstance(value, dict):
            for key in ("attn_implementation", "experts_implementation"):
                for spelt in (key, f"_{key}", f"_{key}_internal"):
                    said = value.get(spelt)
                    if said is not None and not re.fullmatch(r"\w{1,40}", str(said)):
                        yield f"{spelt} is {repr(said)[:40]}, expected a name without code"
        if isinstance(value, dict | list):
            level += value.values() if isinstance(value, dict) else value


def _impossible_experts(config: dict[str, Any], row: Family) -> Iterator[str]:
    """What is wrong with the sizes that the family's row names."""
    there = (key for key in row.num_experts if config.get(key) is not None)
    spelt = next(there, row.num_experts[0])
    top_k = row.top_k if isinstance(row.top_k, str) else spelt
    for key in (spelt, top_k, row.expert_width):
        yield from _each_whole(config, key, 1, _LARGEST_MOE)
    for key in filter(None, (row.shared_experts, row.shared_width)):
        yield from _not_whole(config, key, 0, _LARGEST_MOE)
    yield from _impossible_layers(config, row)
    experts = first_of(config, spelt)
    if first_of(config, top_k) > experts:
        yield f"{top_k} is {config[top_k]}, but there are {experts} experts"
    if "num_groups" in row.options and "num_groups" not in said_by_words(row, config):
        yield from _impossible_groups(config, row, experts)


def _impossible_layers(config: dict[str, Any], row: Family) -> Iterator[str]:
    """What is wrong with the keys that say which layers are MoE layers."""
    least = {"step": 1, "last": -1}
    for what, key in row.layers.items():
        value = config.get(key)
        if value is None:
            continue
        said = f"{key} is {repr(value)[:40]}, expected"
        if what == "types" and not _is_list(value, str):
            yield f"{said} a list of words"
        elif what in ("listed", "dense") and not _is_list(value, int):
            yield f"{said} a list of layers"
        elif what == "pattern" and not isinstance(value, str):
            yield f"{said} a letter per layer"
        elif what in ("first", "last", "step", "offset"):
            yield from _not_whole(config, key, least.get(what, 0), _LARGEST_MOE)


def _each_whole(config: dict[str, Any], key: str, least: int, largest: int) -> Iterator[str]:
    """As _not_whole, where a list may say the same number for every layer."""
    values = config.get(key)
    if not isinstance(values, list):
        yield from _not_whole(config, key, least, largest)
    elif not values or any(value != values[0] for value in values):
        yield f"{key} is {repr(values)[:40]}, expected the same number for every layer"
    else:
        yield from _not_whole({key: values[0]}, key, least, largest)


def _impossible_groups(config: dict[str, Any], row: Family, num_experts: int) -> Iterator[str]:
    """Groups that do not divide the experts, or too few experts in those that a token may use."""
    key, chosen_key = row.options["num_groups"], row.options["topk_groups"]
    if not {key, chosen_key} <= set(config):  # the class says it, then
        return
    yield from _not_whole(config, key, 1, num_experts)
    yield from _not_whole(config, chosen_key, 1, config[key])
    (each, rest), top_k = divmod(num_experts, config[key]), first_of(config, str(row.top_k))
    if rest or each < 2:  # a group is scored by its two best experts
        yield f"{key} is {config[key]}, expected groups of two or more of {num_experts} experts"
    elif top_k > config[chosen_key] * each:
        yield f"{row.top_k} is {top_k}, more than {config[chosen_key]} groups hold"


def _not_whole(config: dict[str, Any], key: str, least: int, largest: int) -> Iterator[str]:
    value = config.get(key)
    if type(value) is not int or not least <= value <= largest:
        said = f"is {repr(value)[:40]}" if key in config else "is missing"
        yield f"{key} {said}, expected a whole number from {least} to {largest}"


def _not_real(
    config: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]], where: str = ""
) -> Iterator[str]:
    """Numbers outside their ranges, and any that are NaN or infinite."""
    for key, value in config.items():
        name = f"{where}.{key}" if where else key
        least, largest = ranges.get(key, (-math.inf, math.inf))
        known = key in ranges and value is not None
        if known and not (_is_number(value) and least <= value <= largest):
            yield f"{name} is {repr(value)[:40]}, expected a number from {least:g} to {largest:g}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}, expected a finite number"


def _is_list(value: Any, kind: type) -> bool:
    """Whether it is a list of words, or of whole numbers from 0 on."""
    if not (isinstance(value, list) and all(type(each) is kind for each in value)):
        return False
    return kind is str or min(value, default=0) >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
