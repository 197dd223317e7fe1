"""Build a model from sizes, with random weights: an MoE, its dense twin, or any dense class."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from expertly.errors import ExpertlyError, nearest
from expertly.families import FAMILIES, dense_keys, sizes
from expertly.models.experts import register_experts

ModelShape = PretrainedConfig  # what the floors above, which don't import transformers, call it

# our word for a size -> the family's config key, where they differ from the config's own
_MOE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts")


def model_config(family: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """A transformers config of a family from sizes in Qwen3-MoE's spellings.

    num_experts, num_experts_per_tok, moe_intermediate_size and num_shared_experts are translated
    to the family's own keys; every other key is the config's. Raises E306 for an unknown family,
    E202 for a size that it does not have or refuses.
    """
    if family not in CONFIG_MAPPING:
        raise ExpertlyError("E306", f"family {family!r}", "unknown", fix=nearest(family, FAMILIES))
    keys = _translate(family, dict(given))
    known = AutoConfig.for_model(family).to_dict()
    unknown = sorted(set(keys) - set(known) - {"head_dim", "num_experts"})
    if unknown:
        fix = nearest(unknown[0], known)
        raise ExpertlyError("E202", f"model.{unknown[0]}", f"{family} has no such size", fix=fix)
    try:
        config = AutoConfig.for_model(family, **keys)
    except (TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ExpertlyError("E202", f"model.{family}", why, fix="correct this size") from error
    if family in FAMILIES:
        _check_top_k(config)
        if "intermediate_size" not in {*keys, FAMILIES[family].expert_width}:
            # of the dense layers, where a family has some: as wide as the others
            moe = sizes(config.to_dict())
            config.intermediate_size = moe.top_k * moe.expert_width + moe.shared_width
    return config


def twin_config(config: PretrainedConfig) -> PretrainedConfig:
    """The dense twin of an MoE config: its family's dense class, all else equal.

    Its feed-forward is as wide as the experts that one token uses, so active parameters agree but
    for the router.
    """
    raw = config.to_dict()
    raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    keys = dense_keys(raw)
    known = AutoConfig.for_model(keys["model_type"]).to_dict()
    kept = {key: value for key, value in keys.items() if key in known and key != "model_type"}
    for stale in ("architectures", "transformers_version", "head_dim" * ("head_dim" not in known)):
        kept.pop(stale, None)
    return AutoConfig.for_model(keys["model_type"], **kept)


def build_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights, in float32; its experts run on our experts function."""
    kind = {"experts_implementation": register_experts()} if config.model_type in FAMILIES else {}
    return AutoModelForCausalLM.from_config(config, **kind)


def _translate(family: str, given: dict[str, Any]) -> dict[str, Any]:
    """Sizes under the family's own keys, with what training from scratch needs filled in."""
    if family not in FAMILIES:
        return given
    row = FAMILIES[family]
    ours = (row.num_experts[0], row.top_k, row.expert_width, row.shared_experts)
    for size, key in zip(_MOE_SIZES, ours, strict=True):
        if key is not None and size in given:
            given[key] = given.pop(size)
    return {**row.scratch, **given}


def _check_top_k(config: PretrainedConfig) -> None:
    moe = sizes(config.to_dict())
    if not 1 <= moe.top_k <= moe.num_experts:
        why = f"top_k is {moe.top_k}, but there are {moe.num_experts} experts"
        fix = f"choose a top_k from 1 to {moe.num_experts}"
        raise ExpertlyError("E202", "model.num_experts_per_tok", why, fix=fix)
