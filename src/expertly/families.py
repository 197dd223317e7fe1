"""What differs between model families, as one table of plain data: a row per family, no code.

A row says which config keys hold the sizes, which rule the family's router follows, and where it
keeps its selection bias. Nothing is ever guessed from tensor sizes. Readers take the raw dict of
a `config.json`, so planning needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError, nearest


@dataclass(frozen=True, kw_only=True)
class Family:
    """One MoE family of transformers."""

    name: str  # config.json's model_type
    dense: str  # model_type of the dense class of the same make: the twin
    num_experts: tuple[str, ...]  # config keys that may hold it, the first is written
    top_k: str = "num_experts_per_tok"
    expert_width: str = "moe_intermediate_size"
    shared_experts: str | None = None  # key: how many always-on experts, expert_width each
    first_dense: str | None = None  # key: how many first layers are dense
    sparse_step: str | None = None  # key: every how many layers one is an MoE layer, from 1
    dense_layers: str | None = None  # key: the indices of further dense layers
    router: str = "gate"  # the router's name inside the MoE block
    rule: str = "softmax_topk"  # a name in expertly.moe.routing.ROUTERS
    options: Mapping[str, str] = field(default_factory=dict)  # rule option -> config key
    fixed: Mapping[str, Any] = field(default_factory=dict)  # rule option -> what the code says
    bias: str | None = None  # the selection bias, a dotted path inside the router module
    # what released checkpoints say where a class default would not do for training from scratch
    scratch: Mapping[str, Any] = field(default_factory=dict)


class Sizes(NamedTuple):
    """A family's MoE sizes, in our words."""

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int  # of the always-on experts together
    first_dense: int  # how many first layers are dense


FAMILIES = {
    row.name: row
    for row in (
        Family(
            name="mixtral",
            dense="mistral",
            num_experts=("num_local_experts",),
            expert_width="intermediate_size",
            fixed={"renormalize": True},
        ),
        Family(
            name="qwen3_moe",
            dense="qwen3",
            num_experts=("num_experts", "num_local_experts"),
            sparse_step="decoder_sparse_step",
            dense_layers="mlp_only_layers",
            options={"renormalize": "norm_topk_prob"},
            scratch={"norm_topk_prob": True},
        ),
        Family(
            name="olmoe",
            dense="olmo2",
            num_experts=("num_experts",),
            expert_width="intermediate_size",
            options={"renormalize": "norm_topk_prob"},
        ),
        Family(
            name="deepseek_v3",
            dense="deepseek_v3",
            num_experts=("n_routed_experts", "num_local_experts"),
            shared_experts="n_shared_experts",
            first_dense="first_k_dense_replace",
            rule="biased_sigmoid_topk",
            options={
                "renormalize": "norm_topk_prob",
                "num_groups": "n_group",
                "topk_groups": "topk_group",
                "scale": "routed_scaling_factor",
            },
            bias="e_score_correction_bias",
            # no groups, no extra prediction modules: at small sizes both are only in the way
            scratch={
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "num_nextn_predict_layers": 0,
            },
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family's row, or None for a dense or unknown model_type."""
    return FAMILIES.get(config.get("model_type", ""))


def require_family(config: Mapping[str, Any]) -> Family:
    """The family's row; E306 for a model_type that the table does not hold."""
    name = str(config.get("model_type", ""))
    if name not in FAMILIES:
        why = "no row in the family table"
        raise ExpertlyError("E306", f"model_type {name!r}", why, fix=nearest(name, FAMILIES))
    return FAMILIES[name]


def sizes(config: Mapping[str, Any]) -> Sizes:
    """The MoE sizes that a raw config dict states. Raises E306 for an unknown family, E305 for
    a config without them.
    """
    row = require_family(config)
    width = first_of(config, row.expert_width)
    return Sizes(
        num_experts=first_of(config, *row.num_experts),
        top_k=first_of(config, row.top_k),
        expert_width=width,
        shared_width=width * (first_of(config, row.shared_experts) if row.shared_experts else 0),
        first_dense=(first_of(config, row.first_dense) or 0) if row.first_dense else 0,
    )


def moe_layer_indices(config: Mapping[str, Any]) -> list[int]:
    """Which of the layers are MoE layers; the others are dense. Raises E305, E306 as sizes does."""
    row, first = require_family(config), sizes(config).first_dense
    # configs leave both out, or say null, for none
    step = (config.get(row.sparse_step) if row.sparse_step else None) or 1
    dense = (config.get(row.dense_layers) if row.dense_layers else None) or ()
    layers = range(first, config["num_hidden_layers"])
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def rule_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the family's routing rule, as its config and code fix them."""
    row = require_family(config)
    said = {option: first_of(config, key) for option, key in row.options.items()}
    return {**row.fixed, **said}


def stock_keys(
    row: Family, rule: str, top_k: int, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The config keys that say a routing rule in the family's own words; None if they cannot."""
    sayable = {*row.fixed, *row.options}
    if rule != row.rule or not set(options) <= sayable:
        return None
    if any(options.get(option, value) != value for option, value in row.fixed.items()):
        return None
    said = {
        row.options[option]: value for option, value in options.items() if option in row.options
    }
    return {row.top_k: top_k, **said}


def dense_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dense twin: all else equal, as wide as the experts one token uses.

    The keys are the MoE config's, with model_type and the feed-forward width replaced; a reader
    drops those that the dense class does not know. It is a twin only where the MoE's own dense
    layers, if it has any, are as wide.
    """
    row, moe = require_family(config), sizes(config)
    twin = {**config, "model_type": row.dense}
    twin["intermediate_size"] = moe.top_k * moe.expert_width + moe.shared_width
    if row.first_dense and row.dense == row.name:
        twin[row.first_dense] = config["num_hidden_layers"]
    return twin


def first_of(config: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first of several spellings that a config holds; E305 for none."""
    for key in keys:
        if key in config:
            return config[key]
    why = f"none of {', '.join(keys)} is there"
    raise ExpertlyError("E305", "config.json", why, fix="check that this is an MoE checkpoint")
