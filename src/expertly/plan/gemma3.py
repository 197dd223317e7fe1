"""The Shape of a Gemma 3 that sees: its decoder, a SigLIP tower and the projection between them.

No token of text passes the tower, which is why it is held and not used. Counted as transformers'
Gemma3ForConditionalGeneration is made.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertly.plan.numbers import whole, wrong
from expertly.plan.shape import Shape

Config = Mapping[str, Any]
_NOTE = "with its vision tower, which is held, but no token of text passes it"


def with_tower(config: Config, text: Shape) -> Shape:
    """A composite's Shape, from that of its decoder. Raises E305 for sizes that are none."""
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        raise wrong("vision_config is missing, expected an object")
    projection = whole(tower, "hidden_size") * (text.dim + 1)  # and its norm
    return replace(
        text,
        family=config["model_type"],
        beside=_siglip(tower) + projection,
        notes=(*text.notes, _NOTE),
    )


def _siglip(config: Config) -> int:
    """Parameters of a SigLIP vision tower without its pooling head."""
    dim, width = whole(config, "hidden_size"), whole(config, "intermediate_size")
    patch, image = whole(config, "patch_size"), whole(config, "image_size")
    channels = whole({"num_channels": config.get("num_channels", 3)}, "num_channels")
    patches = channels * patch**2 * dim + dim
    places = (image // patch) ** 2 * dim
    attention = 4 * (dim * dim + dim)
    network = 2 * dim * width + width + dim
    layers = whole(config, "num_hidden_layers", most=10_000)
    return patches + places + layers * (attention + network + 4 * dim) + 2 * dim
