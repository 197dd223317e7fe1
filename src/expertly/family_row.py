"""What a row of the family table can say about one MoE family: plain data, no code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One MoE family of transformers. Every key is one of its config's."""

    name: str  # config.json's model_type
    dense: str | None = None  # model_type of the dense class of the same make: the twin
    nested: str | None = None  # key of the decoder's config in a composite one, such as text_config
    num_experts: tuple[str, ...]  # keys that may hold it, the first is written
    top_k: str | int = "num_experts_per_tok"  # a number where the code says it
    expert_width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"  # of the dense layers among the others
    shared_experts: str | None = None  # key: how many always-on; none: one if it has a width
    shared_width: str | None = None  # key: the width of each; none: expert_width
    may_be_dense: bool = False  # models without experts bear its name, too
    # Which layers are MoE layers, by keys; none: all. types: a list with a word per layer; pattern:
    # a letter per layer; listed: their indices; dense: the indices of dense ones; first: where they
    # begin, and last: end; step: every how many there is one, at the offset, which is step - 1 if
    # nothing says it.
    layers: Mapping[str, str] = field(default_factory=dict)
    unless: str | None = None  # the attribute of a block with experts that no rule chooses
    router: str = "gate"  # the router's name in the MoE block
    rule: str = "softmax_topk"  # a name in expertly.moe.routing.ROUTERS
    options: Mapping[str, str] = field(default_factory=dict)  # rule option -> key
    fixed: Mapping[str, Any] = field(default_factory=dict)  # rule option -> what the code says
    # key -> the config's word -> what it says in ours: options, or another "rule"
    words: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    bias: str | None = None  # the selection bias in the MoE block, a dotted path
    logits: str = "linear"  # a name in expertly.models.layers.LOGITS
    answer: str = "triple"  # how router and experts talk, a name in expertly.models.answers.ANSWERS
    only_own: str | None = None  # why it can follow no rule but its own
    # what training from scratch needs where the class default would not do
    scratch: Mapping[str, Any] = field(default_factory=dict)
