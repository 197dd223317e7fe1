"""Which stock MoE can say a dense model exactly: plain data about both sides, no tensors.

A dense make is read by what its layers need; a target by what its layers can say. Nothing is
approximated: what no target can say is refused with the reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from expertly.errors import ExpertlyError, nearest
from expertly.families import FAMILIES, family_of


@dataclass(frozen=True, kw_only=True)
class Make:
    """What the layers of a dense make are like, or those of an MoE family."""

    norms: str = "before"  # of attention and feed-forward: before or after them
    qk_norm: str = "none"  # none, of each head, or over the whole width
    folded: bool = False  # norms say 1 + w and embeddings are scaled, as in Gemma


@dataclass(frozen=True, kw_only=True)
class Target(Make):
    """A stock MoE family, and its names on disk."""

    name: str  # model_type
    biases: tuple[str, ...] = ("none",)  # of attention that it can have: none, qkv, all
    windows: tuple[str, ...] = ("none",)  # of attention: none, all layers, or some of them
    dense_layers: bool = False  # whether layers without experts may stand among the others
    shared: bool = False  # it always has a shared expert
    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


DENSE = {
    "llama": Make(),
    "mistral": Make(),
    "qwen2": Make(),
    "qwen3": Make(qk_norm="head"),
    "gemma": Make(folded=True),
    "olmo2": Make(norms="after", qk_norm="width"),
}
# in the order of preference
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="mixtral",
            windows=("none", "all"),
            block="block_sparse_moe",
            matrices=("w1", "w3", "w2"),
        ),
        Target(
            name="qwen3_moe",
            qk_norm="head",
            biases=("none", "all"),
            windows=("none", "all"),
            dense_layers=True,
        ),
        Target(
            name="qwen2_moe",
            biases=("none", "qkv"),
            windows=("none", "all", "some"),
            dense_layers=True,
            shared=True,
        ),
        Target(name="olmoe", qk_norm="width", biases=("none", "all")),
        Target(name="flex_olmo", norms="after", qk_norm="width", biases=("none", "all")),
    )
}


def choose_target(
    config: Mapping[str, Any],
    asked: str,
    *,
    every: int,
    shared: bool,
    fix: str = "leave the target out",
) -> Target:
    """The stock MoE that says a dense model exactly, with experts in every n-th layer.

    config: the dense model's, as a dict. asked: a target's name, or ""; fix: how to ask for none.
    One that always has a shared expert is taken only where no other will do. Raises E306 for a
    model that is no dense one of a make we read, and where no target can say it; E202 for an
    unknown or unfit target.
    """
    make = _make(config)
    if asked and asked not in TARGETS:
        raise ExpertlyError(
            "E202", "target", f"{asked!r} is none of ours", fix=nearest(asked, TARGETS)
        )
    why = {
        target.name: next(_unfit(config, make, target, every, shared), "")
        for target in TARGETS.values()
    }
    fit = [name for name in ([asked] if asked else TARGETS) if not why[name]]
    if fit:
        return TARGETS[fit[0]]
    if asked:
        raise ExpertlyError("E202", f"target {asked}", why[asked], fix=fix)
    nearly = {name: said for name, said in why.items() if TARGETS[name].qk_norm == make.qk_norm}
    said = "; ".join(f"{name}: {reason}" for name, reason in (nearly or why).items())
    what = f"model_type {config['model_type']!r}"
    alone = any(not list(_unlike(config, make, target)) for target in TARGETS.values())
    other = "leave out every and shared" if alone else "choose another dense model"
    raise ExpertlyError("E306", what, f"no stock MoE says it exactly ({said})", fix=other)


def biases(config: Mapping[str, Any]) -> str:
    """Which of attention's four matrices have biases: none, qkv, all."""
    if config["model_type"] == "qwen2":  # its code says so
        return "qkv"
    return "all" if config.get("attention_bias") else "none"


def windows(config: Mapping[str, Any]) -> str:
    """In which layers attention slides: none, all, some."""
    if types := config.get("layer_types"):
        sliding = sum(kind == "sliding_attention" for kind in types)
        return {0: "none", len(types): "all"}.get(sliding, "some")
    return "all" if config.get("sliding_window") else "none"


def _make(config: Mapping[str, Any]) -> Make:
    name = config["model_type"]
    what = f"model_type {name!r}"
    if family_of(config) is not None:
        raise ExpertlyError(
            "E306", what, "an MoE already, expected a dense model", fix="train it, or name a dense"
        )
    if name not in DENSE:
        others = ", ".join(DENSE)
        why = f"not a dense make that is read ({others})"
        raise ExpertlyError("E306", what, why, fix="name a model of one of these")
    return DENSE[name]


def _unfit(
    config: Mapping[str, Any], make: Make, target: Target, every: int, shared: bool
) -> Iterator[str]:
    """Why a target cannot say a dense model with experts where they are asked for."""
    yield from _unlike(config, make, target)
    if every > 1 and not target.dense_layers:
        yield "all of its layers have experts"
    if shared and not target.shared:
        yield "it has no shared expert"


def _unlike(config: Mapping[str, Any], make: Make, target: Target) -> Iterator[str]:
    """What of a dense model a target cannot say."""
    if make.norms != target.norms:
        yield f"its norms stand {target.norms} attention and feed-forward"
    if make.qk_norm != target.qk_norm:
        yield f"qk-norm: {make.qk_norm}, it has {target.qk_norm}"
    if biases(config) not in target.biases:
        yield f"attention biases: {biases(config)}, it has {' or '.join(target.biases)}"
    if config.get("mlp_bias"):
        yield "its experts have no biases, the feed-forward has"
    if windows(config) not in target.windows:
        yield f"attention slides in {windows(config)} layers, its in {' or '.join(target.windows)}"
    if config.get("use_bidirectional_attention"):
        yield "its attention looks back only"


def target_keys(config: Mapping[str, Any], target: Target, moe_layers: list[int]) -> dict[str, Any]:
    """What the target's config says besides sizes that both have, and the experts'."""
    layers = config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    keys: dict[str, Any] = {"head_dim": config.get("head_dim") or config["hidden_size"] // heads}
    if "renormalize" in FAMILIES[target.name].options:
        keys["norm_topk_prob"] = True
    if target.dense_layers:
        keys["decoder_sparse_step"] = 1
        keys["mlp_only_layers"] = [i for i in range(layers) if i not in moe_layers]
        keys["intermediate_size"] = config["intermediate_size"]
    if target.shared:
        keys["shared_expert_intermediate_size"] = config["intermediate_size"]
        keys["qkv_bias"] = biases(config) == "qkv"
    if windows(config) != "none" and target.dense_layers:
        keys["use_sliding_window"] = True
        keys["max_window_layers"] = 0 if windows(config) == "all" else layers
    if windows(config) == "all" and target.shared:
        keys["layer_types"] = ["sliding_attention"] * layers
    if DENSE[config["model_type"]].folded:
        keys["tie_word_embeddings"] = False
    return keys
