"""What differs between model families, as plain data: the readers of the family table.

A row says which config keys hold the sizes, which rule the family's router follows, and where it
keeps its selection bias. Nothing is ever guessed from tensor sizes. Readers take the raw dict of
a `config.json`, so planning needs no torch.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError, nearest
from expertly.family_row import Family
from expertly.family_table import FAMILIES, REFUSED

# the words with which configs call a layer an MoE layer
_MOE_WORDS = ("sparse", "moe", "E")
# the keys, by Family.layers, that have a word or a letter for each layer
_PER_LAYER = ("types", "pattern")


class Sizes(NamedTuple):
    """A family's MoE sizes, in our words."""

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int  # of the always-on experts together


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family's row, or None for a dense or unknown model_type, or a dense model of its name."""
    row = FAMILIES.get(config.get("model_type", ""))
    return None if row and row.may_be_dense and not _has_experts(config, row) else row


def require_family(config: Mapping[str, Any]) -> Family:
    """The family's row; E306 for a model_type that the table does not hold, or refuses."""
    name = str(config.get("model_type", ""))
    if name in REFUSED:
        raise ExpertlyError("E306", f"model_type {name!r}", REFUSED[name], fix="name another model")
    if name not in FAMILIES:
        why = "no row in the family table"
        raise ExpertlyError("E306", f"model_type {name!r}", why, fix=nearest(name, FAMILIES))
    return FAMILIES[name]


def decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that the family's keys are in: all of it, or a composite's decoder."""
    row = FAMILIES.get(config.get("model_type", ""))
    if row is None:  # a dense composite has its decoder's config where most have it
        text = config.get("text_config")
        return text if isinstance(text, dict) and "hidden_size" not in config else config
    if row.nested is None:
        return config
    inner = config.get(row.nested)
    return inner if isinstance(inner, dict) else {}


def num_layers(config: Mapping[str, Any]) -> int:
    """How many layers a config says, of any family: by number, or by a word each; 0 if it does not.

    A composite's are those of its decoder.
    """
    said, row = decoder(config), FAMILIES.get(config.get("model_type", ""))
    for key in ("num_hidden_layers", "num_layers"):
        if isinstance(said.get(key), int):
            return int(said[key])
    lists = [row.layers.get(what, "") for what in _PER_LAYER] if row else []
    return next((len(said[key]) for key in lists if said.get(key)), 0)


def sizes(config: Mapping[str, Any]) -> Sizes:
    """The MoE sizes that a raw config dict states. Raises E306 for an unknown family, E305 for
    a config without them.
    """
    row, said = require_family(config), decoder(config)
    width = first_of(said, row.expert_width)
    shared = int(row.shared_width is not None)
    if row.shared_experts:
        shared = first_of(said, row.shared_experts)
    each = first_of(said, row.shared_width) if row.shared_width else width
    return Sizes(
        num_experts=first_of(said, *row.num_experts),
        top_k=row.top_k if isinstance(row.top_k, int) else first_of(said, row.top_k),
        expert_width=width,
        shared_width=each * shared,
    )


def moe_layer_indices(config: Mapping[str, Any]) -> list[int]:
    """Which of the layers are MoE layers; the others are dense. Raises E305, E306 as sizes does."""
    row, config = require_family(config), decoder(config)
    # configs leave any of it out, or say null, for none
    said = {what: config[key] for what, key in row.layers.items() if config.get(key) is not None}
    if words := said.get("types", said.get("pattern")):
        return [layer for layer, word in enumerate(words) if word in _MOE_WORDS]
    if "listed" in said:
        return sorted(said["listed"])
    total = first_of(config, "num_hidden_layers", "num_layers")
    first, last, step = said.get("first", 0), said.get("last", -1), said.get("step", 1)
    layers = range(first, total if last == -1 else min(last + 1, total))
    offset = said.get("offset", step - 1)
    dense = said.get("dense", ())
    return [layer for layer in layers if layer % step == offset and layer not in dense]


def rule_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the options of the family's routing rule, as its config and code fix them."""
    row, config = require_family(config), decoder(config)
    said = {option: first_of(config, key, null=True) for option, key in row.options.items()}
    options = {**row.fixed, **said}
    options.update(said_by_words(row, config))
    rule = options.pop("rule", row.rule)
    return rule, {option: value for option, value in options.items() if value is not None}


def said_by_words(row: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and perhaps the rule, that a family's config says by words; E305 for others."""
    said: dict[str, Any] = {}
    for key, meanings in row.words.items():
        word = config.get(key)
        if word is None:  # the class default, then: what the row says
            continue
        if not isinstance(word, str | bool) or word not in meanings:
            why = f"{key} is {repr(word)[:40]}, expected one of {', '.join(map(str, meanings))}"
            raise ExpertlyError("E305", "config.json", why, fix=f"correct {key}")
        said.update(meanings[word])
    return said


def stock_keys(
    config: Mapping[str, Any], top_k: int, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What to write over a config so that it may say a rule: a set for each choice of its words.

    options: of the rule, in full. What a set really says, rule_of tells.
    """
    row = require_family(config)
    keys = {key: options[option] for option, key in row.options.items() if option in options}
    for words in product(*row.words.values()):
        made = {**keys, **dict(zip(row.words, words, strict=True))}
        if isinstance(row.top_k, str):
            made[row.top_k] = top_k
        yield {row.nested: {**(config.get(row.nested) or {}), **made}} if row.nested else made


def dense_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dense twin: all else equal, as wide as the experts one token uses.

    The keys are the MoE config's, with model_type and the feed-forward width replaced; a reader
    drops those that the dense class does not know. It is a twin only where the MoE's own dense
    layers, if it has any, are as wide. Raises E202 for a family without a dense class.
    """
    row, moe = require_family(config), sizes(config)
    if row.dense is None:
        why = f"transformers has no dense class of {row.name}'s make"
        raise ExpertlyError("E202", "model.twin", why, fix="choose a family that has one")
    twin = {**config, "model_type": row.dense}
    own = row.dense == row.name
    twin[row.dense_width if own else "intermediate_size"] = active_width(moe)
    if own:
        layers = config["num_hidden_layers"]
        none = {
            "first": layers,
            "dense": [*range(layers)],
            "types": ["dense"] * layers,
            "listed": [],
        }
        twin.update({key: none[what] for what, key in row.layers.items() if what in none})
    return twin


def active_width(moe: Sizes) -> int:
    """How wide the experts together are that one token uses."""
    return moe.top_k * moe.expert_width + moe.shared_width


def first_of(config: Mapping[str, Any], *keys: str, null: bool = False) -> Any:
    """The value of the first of several spellings that a config holds; E305 for none.

    null: it may be null. A list with the same value for every layer is that value.
    """
    for key in keys:
        value = config.get(key)
        if isinstance(value, list):
            value = value[0] if value and value == value[:1] * len(value) else None
        if value is not None or (null and key in config):
            return value
    why = f"none of {', '.join(keys)} is there"
    raise ExpertlyError("E305", "config.json", why, fix="check that this is an MoE checkpoint")


def _has_experts(config: Mapping[str, Any], row: Family) -> bool:
    """Whether a config says more than one expert, and that some layer has them."""
    said = decoder(config)
    types = said.get(row.layers.get("types", ""))
    some = not isinstance(types, list) or any(word in _MOE_WORDS for word in types)
    counts = [said.get(key) for key in row.num_experts]
    return some and any(count not in (None, 0, 1) for count in counts)
