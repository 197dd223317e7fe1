"""From counted parameters to a Shape, for families that have no formulas here.

models/count.py counts; what no count says, caches and windows, is read as common keys say it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from expertly.families import decoder, family_of, sizes
from expertly.plan.makes import MAKES, Make
from expertly.plan.numbers import whole, wrong
from expertly.plan.reading import Config, attention, experts, with_defaults
from expertly.plan.shape import Attention, FeedForward, Layer, Shape
from expertly.plan.stored import stored_as


def check_sizes(config: Config) -> None:
    """Raises E305 for a config without the sizes that a model without formulas must say."""
    said, _ = _text(config)
    for key in ("hidden_size", "vocab_size", "num_attention_heads"):
        whole(said, key)


def shape_of_counts(
    config: Config, name: str, layers: Sequence[Mapping[str, int]], rest: Mapping[str, int]
) -> Shape:
    """A Shape from parameters by part: of each layer, and of the rest. Raises E305.

    A layer that is called anything else than an attention keeps no cache that grows.
    """
    if not layers:
        raise wrong("no layers are found by num_hidden_layers")
    said, make = _text(config)
    dim, vocab = whole(said, "hidden_size"), whole(said, "vocab_size")
    inner = FeedForward()
    if family_of(config) is not None:
        inner = experts({**said, **config, "hidden_size": dim}, make, sizes(config))
    blocks = tuple(
        _counted(counts, _cached(said, make, index), inner) for index, counts in enumerate(layers)
    )
    stored = stored_as(config)
    rest_of = sum(
        count for part, count in rest.items() if part not in ("embeddings", "head", "norms")
    )
    composite = decoder(config) is not config  # the rest is a tower, or a projection from one
    uncounted = f"{config['model_type']} has no formulas here: counted on the meta device"
    return Shape(
        name=name,
        family=config["model_type"],
        dim=dim,
        vocab=vocab,
        layers=blocks,
        embeddings=rest.get("embeddings", 0),
        head=rest.get("head", 0),
        norms=rest.get("norms", 0),
        other=0 if composite else rest_of,
        beside=rest_of if composite else 0,
        context=said.get("max_position_embeddings"),
        stored=stored.formats,
        notes=(uncounted, *stored.notes),
    )


def _text(config: Config) -> tuple[Config, Make]:
    """What says the language model's sizes, of a composite one too, and how it is made."""
    said = decoder(config)
    make = MAKES.get(said.get("model_type", ""), Make(window="all"))
    return with_defaults(said, make), make


def _cached(said: Config, make: Make, layer: int) -> Attention:
    """What a counted layer's attention keeps; nothing where the layer's kind is another."""
    kinds = said.get("layer_types")
    kind = kinds[layer] if isinstance(kinds, list) and len(kinds) > layer else "attention"
    attends = "attention" in str(kind) and "linear" not in str(kind)
    return attention(said, make, layer) if attends else Attention()


def _counted(counts: Mapping[str, int], seen: Attention, inner: FeedForward) -> Layer:
    """A layer with counted parameters, and sizes as they were read."""
    held = counts.get("experts", 0)
    if held and not inner.experts:
        raise wrong("it has experts, but does not say how many")
    network = FeedForward(
        dense=counts.get("dense layers", 0),
        shared=counts.get("shared experts", 0),
        width=inner.width if held else 0,
    )
    if held:
        network = replace(
            inner,
            dense=counts.get("dense layers", 0),
            shared=counts.get("shared experts", 0),
            router=counts.get("router", 0),
            expert=held // inner.experts,
        )
    return Layer(
        attention=replace(seen, weights=counts.get("attention", 0), norms=0),
        feed_forward=network,
        norms=counts.get("norms", 0),
        other=counts.get("other", 0) + (0 if held else counts.get("router", 0)),
    )
