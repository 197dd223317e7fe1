"""A dense model to start from: opened, and checked against its own config.json."""

from pathlib import Path
from typing import NamedTuple

from expertly.errors import ExpertlyError
from expertly.models.build import ModelShape, own_keys
from expertly.models.files import check_manifest
from expertly.models.loading import open_config, skeleton
from expertly.models.shards import Shards

_BUFFER = "rotary_emb.inv_freq"  # that old checkpoints kept
# of a config: what no feed-forward hangs on
_MAY_DIFFER = (
    *("architectures", "dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
)


class Dense(NamedTuple):
    """A dense model, its weights unread."""

    folder: Path
    shape: ModelShape
    weights: Shards
    names: list[str]  # its tensors, in the files' order

    @property
    def head(self) -> str:
        """The name of the matrix that makes logits."""
        return "lm_head.weight" if "lm_head.weight" in self.names else "model.embed_tokens.weight"


def open_dense(folder: Path, shape: ModelShape) -> Dense:
    """The weights of a folder with this config, every name and shape compared.

    Raises E301 and E302 for weights that are damaged or not of this config, E306 for quantised
    ones, E310 for pickled ones.
    """
    check_manifest(folder, hashes=True)
    weights = Shards(folder)
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in skeleton(folder, shape).state_dict().items()
        if name != "lm_head.weight" or not shape.tie_word_embeddings
    }
    names = [name for name in weights.names if not name.endswith(_BUFFER)]
    if shape.tie_word_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
    _require(folder, wanted, {name: weights.entry(name).shape for name in names})
    return Dense(folder, shape, weights, names)


def open_like(folder: Path, base: Dense) -> Dense:
    """A specialist of a base model. Raises what open_dense does, and E305 for one unlike it."""
    model = open_dense(folder, open_config(folder))
    mine, theirs = own_keys(model.shape), own_keys(base.shape)
    for key in ("model_type", *theirs):
        if key not in _MAY_DIFFER and mine.get(key) != theirs[key]:
            why = f"{key} is {mine.get(key)}, the base's {theirs[key]}"
            raise ExpertlyError("E305", str(folder), why, fix="name models that came from one base")
    return model


def _require(
    folder: Path, wanted: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]
) -> None:
    wrong = {
        "is missing": [name for name in wanted if name not in there],
        "has no place in the model of config.json": [name for name in there if name not in wanted],
        "has another shape than config.json says": [
            name for name in wanted if there.get(name, wanted[name]) != wanted[name]
        ],
    }
    for why, names in wrong.items():
        if names:
            raise ExpertlyError("E301", str(folder), f"{names[0]} {why}", fix="copy it again")
