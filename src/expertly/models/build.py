"""Build a model from sizes, with random weights: an MoE, its dense twin, or any dense class."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from expertly.errors import ExpertlyError, nearest
from expertly.families import FAMILIES, REFUSED, active_width, dense_keys, moe_layer_indices, sizes
from expertly.models.experts import register_experts

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
ModelShape = PretrainedConfig  # what the floors above, which don't import transformers, call it

# our word for a size -> the family's config key, where they differ from the config's own
_MOE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts")


def model_config(family: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """A transformers config of a family from sizes in Qwen3-MoE's spellings.

    num_experts, num_experts_per_tok, moe_intermediate_size and num_shared_experts are translated
    to the family's own keys; every other key is the config's. Raises E306 for an unknown family,
    E202 for a size that it does not have or refuses.
    """
    known = _known(family)
    # the ids of the family's own tokenizer mean nothing to another
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    nothing = dict.fromkeys(name for name in ids if name in known)
    keys = {**nothing, **_translate(family, dict(given))}
    row = FAMILIES.get(family)
    spellings = row.num_experts if row else ()  # an old and a new one, of which known has one
    unknown = sorted(set(keys) - set(known) - {"head_dim", *spellings})
    if unknown:
        fix = nearest(unknown[0], known)
        raise ExpertlyError("E202", f"model.{unknown[0]}", f"{family} has no such size", fix=fix)
    if known.get("kv_lora_rank"):  # latent attention: a key per head, whatever the default says
        heads = keys.get("num_attention_heads", known["num_attention_heads"])
        keys.setdefault("num_key_value_heads", heads)
    try:
        config = AutoConfig.for_model(family, **keys)
    except (TypeError, ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise ExpertlyError("E202", f"model.{family}", why, fix="correct this size") from error
    if row and row.dense_width in known and row.dense_width not in {*keys, row.expert_width}:
        # of the dense layers, where a family has some: as wide as the others
        setattr(config, row.dense_width, active_width(sizes(config.to_dict())))
    for key, why in _problems(config.to_dict()):
        raise ExpertlyError("E202", f"model.{key}", why, fix=f"correct {key}")
    if config.to_dict().get("head_dim", 0) is None:  # not every class derives it
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def twin_config(config: PretrainedConfig) -> PretrainedConfig:
    """The dense twin of an MoE config: its family's dense class, all else equal.

    Its feed-forward is as wide as the experts that one token uses, so active parameters agree but
    for the router. Raises E202 for an MoE with dense layers of another width, or without a dense
    class of its make, E306 for an unknown family.
    """
    raw = config.to_dict()
    keys = dense_keys(raw)
    _require_one_width(raw)
    keys["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    known = AutoConfig.for_model(keys["model_type"]).to_dict()
    kept = {key: value for key, value in keys.items() if key in known and key != "model_type"}
    for stale in ("architectures", "transformers_version"):
        kept.pop(stale, None)
    return AutoConfig.for_model(keys["model_type"], **kept)


def moe_config(dense: PretrainedConfig, family: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """An MoE config of a family that takes over all that its class knows of a dense one.

    given: the MoE's sizes in our words, and other keys of the family's. Raises E202 for sizes that
    it refuses.
    """
    known = AutoConfig.for_model(family).to_dict()
    stale = ("model_type", "architectures", "transformers_version", "_name_or_path")
    kept = {k: v for k, v in own_keys(dense).items() if k in known and k not in stale}
    keys = {**kept, **_translate(family, dict(given))}
    try:
        config = AutoConfig.for_model(family, **keys)
    except (TypeError, ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise ExpertlyError("E202", f"target {family}", why, fix="choose other sizes") from error
    for key, why in _problems(config.to_dict()):
        raise ExpertlyError("E202", f"target {family}: {key}", why, fix=f"correct {key}")
    return config


def own_keys(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says and its class reads: a file may hold other keys, of other classes."""
    known = {*AutoConfig.for_model(config.model_type).to_dict(), "head_dim"}  # which any may have
    return {key: value for key, value in config.to_dict().items() if key in known}


def build_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights, in float32; its experts run on our experts function.

    Raises E202 for a config that its class cannot make a model of.
    """
    kind = {"experts_implementation": register_experts()} if config.model_type in FAMILIES else {}
    try:
        return auto_class(config).from_config(config, **kind)
    except (TypeError, ValueError, AttributeError) as error:
        why = f"its class makes no model of these sizes: {str(error)[:200]}"
        fix = f"set what it needs in model.extra, of {', '.join(_unset(config))}"
        raise ExpertlyError("E202", f"model.{config.model_type}", why, fix=fix) from error


def parameters(config: PretrainedConfig) -> int:
    """How many numbers a model of this config learns; nothing of its size is allocated."""
    with torch.device("meta"):
        return int(build_model(config).num_parameters())


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """Write config.json for a model whose class a stock loader is to make."""
    with torch.device("meta"):
        config.architectures = [type(build_model(config)).__name__]
    config.save_pretrained(folder)


def _unset(config: PretrainedConfig) -> list[str]:
    """The keys of a config's own class that nothing has given a value."""
    others = {*PretrainedConfig().to_dict(), "pad_token_id"}
    return [k for k, value in config.to_dict().items() if value is None and k not in others]


def auto_class(config: PretrainedConfig) -> Any:
    """What makes a model of a config: of a composite MoE the whole, not its decoder alone."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    whole = config.model_type in FAMILIES and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return AutoModelForMultimodalLM if whole else AutoModelForCausalLM


def _known(family: str) -> dict[str, Any]:
    """A family's config as its class makes it. Raises E306 for one that cannot be built here."""
    row = FAMILIES.get(family)
    why = REFUSED.get(family) if family in CONFIG_MAPPING else "unknown"
    if row and row.nested:
        why = "a composite of several models, which can be opened but not built from sizes"
    if why is None:
        known = AutoConfig.for_model(family).to_dict()
        if not known.get("is_encoder_decoder"):
            return known
        why = "an encoder-decoder, which can be watched but not trained here"
    raise ExpertlyError(
        "E306", f"family {family!r}", why, fix=nearest(family, FAMILIES.keys() - {family})
    )


def _require_one_width(raw: Mapping[str, Any]) -> None:
    """Raises E202 when a token meets feed-forwards of two widths: a twin has a single one."""
    width = FAMILIES[raw["model_type"]].dense_width
    there, wanted = raw.get(width), active_width(sizes(raw))
    if len(moe_layer_indices(raw)) == raw["num_hidden_layers"] or there == wanted:
        return
    why = f"{there} in the dense layers, but a token uses {wanted} in the MoE layers, so no dense"
    fix = f"set {width}={wanted}"
    raise ExpertlyError("E202", f"model.{width}", f"{why} twin is equal", fix=fix)


def _translate(family: str, given: dict[str, Any]) -> dict[str, Any]:
    """Sizes under the family's own keys, with what training from scratch needs filled in."""
    if family not in FAMILIES:
        return given
    row = FAMILIES[family]
    top_k = row.top_k if isinstance(row.top_k, str) else None
    own = (row.num_experts[0], top_k, row.expert_width, row.shared_experts)
    for size, key in zip(_MOE_SIZES, own, strict=True):
        if key is None or size not in given:
            continue
        value = given.pop(size)
        if given.setdefault(key, value) != value:
            why = f"{value}, but {key} says {given[key]}, which is the same in {family}"
            raise ExpertlyError("E202", f"model.{size}", why, fix=f"leave out {key}")
    width = given.get(row.expert_width)
    if row.shared_width not in (None, row.expert_width) and not row.shared_experts and width:
        # always-on experts in one: as wide as so many of the others
        given.setdefault(row.shared_width, given.pop("num_shared_experts", 1) * width)
    return {**row.scratch, **given}


def _problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Sizes with which no model can be built, as (key, why)."""
    least = "it must be at least 1"
    if row := FAMILIES.get(config["model_type"]):
        moe = sizes(config)
        if not 1 <= moe.top_k <= moe.num_experts:
            yield str(row.top_k), f"{moe.top_k}, but there are {moe.num_experts} experts"
        for key in filter(None, (row.expert_width, row.layers.get("step"))):
            if config[key] < 1:
                yield key, f"{config[key]}, but {least}"
    for key in _POSITIVE:
        if config.get(key) is not None and config[key] < 1:
            yield key, f"{config[key]}, but {least}"
    if config.get("hidden_act") not in (None, *ACT2FN):
        yield "hidden_act", f"no activation is called {config['hidden_act']}"
    yield from _head_problems(config)


def _head_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    heads = config.get("num_attention_heads")
    if not heads:
        return
    of_keys = config.get("num_key_value_heads") or heads
    if config.get("kv_lora_rank") and of_keys != heads:
        yield "num_key_value_heads", f"{of_keys}, but latent attention has one per head: {heads}"
    if heads % of_keys:
        yield "num_key_value_heads", f"{of_keys} do not divide {heads} heads"
    if not config.get("head_dim") and config["hidden_size"] % (2 * heads):
        width = config["hidden_size"]
        yield "num_attention_heads", f"{heads} heads of an even size do not fill {width}"
