"""Count a model's parameters from its config: built on the meta device, where nothing is stored.

For families whose formulas nobody wrote down; plan/ has those of the common ones.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from expertly.families import num_layers
from expertly.models.inspect import part_of
from expertly.models.loading import as_folder, class_config, skeleton

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")  # what its list is called, and which one


class Counted(NamedTuple):
    """Parameters by part: of every decoder layer, and of all the rest."""

    layers: tuple[dict[str, int], ...]
    rest: dict[str, int]


def count_parameters(config: Mapping[str, Any]) -> Counted:
    """What the class of a config holds; shared weights count once, buffers do not.

    Raises E305 as opening a folder with this config does.
    """
    with as_folder(config) as folder:
        model = skeleton(folder, class_config(folder))
    return _by_layer(
        {name: parameter.numel() for name, parameter in model.named_parameters()},
        num_layers(config),
    )


def _by_layer(sizes: Mapping[str, int], layers: int) -> Counted:
    """Parameters sorted into the longest list of `layers` layers, and the rest."""
    stacks: dict[str, dict[int, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for name, size in sizes.items():
        if found := _LAYER.match(name):
            stacks[found[1]][int(found[2])][part_of(name)] += size
    # of several lists as long, a vision tower's perhaps, the largest
    held = {
        stack: sum(counts.total() for counts in there.values())
        for stack, there in stacks.items()
        if len(there) == layers
    }
    stack = max(held, key=lambda name: held[name], default="")
    rest = Counter[str]()
    for name, size in sizes.items():
        if not (found := _LAYER.match(name)) or found[1] != stack:
            rest[part_of(name)] += size
    return Counted(tuple(dict(stacks[stack][i]) for i in range(layers) if held), dict(rest))
