"""Set an upcycling up: everything that can be wrong is found before anything is written."""

import errno
import os
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch

from expertly.errors import ExpertlyError
from expertly.models.build import ModelShape, moe_config, own_keys
from expertly.models.loading import Tokenizer, open_config
from expertly.models.shards import Average, Shards
from expertly.models.tokenizer import open_tokenizer
from expertly.upcycle.config import UpcycleConfig
from expertly.upcycle.dense import Dense, open_dense, open_like
from expertly.upcycle.experts import Change
from expertly.upcycle.recipe import Recipe, read_recipe
from expertly.upcycle.targets import DENSE, Target, choose_target, target_keys

_COPIES = 8
_DOWN = "model.layers.0.mlp.down_proj.weight"  # whose dtype stands for all feed-forwards
_RECIPES = (".yaml", ".yml")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Job(NamedTuple):
    """All that writing and proving work with."""

    config: UpcycleConfig
    recipe: Recipe | None  # None: one dense model
    dense: Dense  # the model, or the base of several
    tokenizer: Tokenizer
    sources: list[Shards]  # of the feed-forwards
    whose: list[int]  # by copy, the source of its feed-forward
    backbone: Shards | Average  # of all the rest
    target: Target
    shape: ModelShape  # the MoE's
    moe_layers: list[int]
    num_experts: int
    top_k: int
    change: Change
    dtype: torch.dtype | None  # of the files; None: each tensor keeps that of its source

    @property
    def copies(self) -> int:
        """How many whole feed-forwards the experts hold together."""
        return self.num_experts // self.change.slices

    @property
    def width(self) -> int:
        """Of one expert."""
        return int(self.dense.shape.intermediate_size) // self.change.slices

    @property
    def folded(self) -> bool:
        """Whether norms and embeddings are written out in full."""
        return DENSE[self.dense.shape.model_type].folded

    @property
    def router(self) -> str:
        """How routers begin: hidden, by the recipe's prompts, or as the config says."""
        return "hidden" if _by_prompts(self.recipe) else self.config.router

    @property
    def exact(self) -> bool:
        """Whether it computes what the dense model does."""
        return self.recipe is None and not self.change.drop and not self.change.noise


def _by_prompts(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.gate_mode == "hidden"


def prepare(config: UpcycleConfig) -> Job:
    """Read and check all inputs. Raises E2xx for what is asked, E3xx for what is there."""
    if os.path.lexists(config.output_dir):
        raise ExpertlyError("E205", config.output_dir, "exists already", fix="name a new folder")
    recipe = _recipe(config)
    folder = recipe.base if recipe else Path(config.model)
    shape = open_config(folder)
    target = _target(config, recipe, shape)
    num_experts, top_k = _sizes(config, recipe, shape)
    layers = [i for i in range(shape.num_hidden_layers) if (i + 1) % config.every == 0]
    if not layers:
        why = f"{config.every}, but there are {shape.num_hidden_layers} layers"
        raise ExpertlyError("E202", "every", why, fix="choose fewer")
    tokenizer = open_tokenizer(folder)
    dense = open_dense(folder, shape)
    whose, sources = _sources(recipe, dense, num_experts // config.slices)
    made = _shape(dense, target, layers, num_experts, top_k, config.slices)
    dtype = _dtype(recipe, dense)
    made.dtype = dtype or _widest(shape, dense, sources)
    job = Job(
        config=config,
        recipe=recipe,
        dense=dense,
        tokenizer=tokenizer,
        sources=sources,
        whose=whose,
        backbone=Average(sources) if recipe and recipe.backbone == "average" else dense.weights,
        target=target,
        shape=made,
        moe_layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        change=_change(config, target),
        dtype=dtype,
    )
    if job.exact:
        _require_exact(config.slices, dtype, dense)
    return job


def _recipe(config: UpcycleConfig) -> Recipe | None:
    """The recipe that config.model is, or None. Raises E202, E305, and what read_recipe does."""
    path = Path(config.model)
    if not os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
        _require_short(path)
        return None
    if path.suffix not in _RECIPES:
        why = f"expected a model's folder, or a recipe in {' or '.join(_RECIPES)}"
        raise ExpertlyError("E305", config.model, why, fix="name the folder that it is in")
    recipe = read_recipe(path)
    if _by_prompts(recipe) and config.router != "random":
        why = f"{config.router}, but the recipe's prompts say how routers begin"
        raise ExpertlyError("E202", "router", why, fix="leave it out")
    return recipe


def _require_short(path: Path) -> None:
    """Raises E305 for a name that no file can have."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            why = os.strerror(error.errno).lower()
            raise ExpertlyError("E305", f"{path}", why, fix="correct it") from error


def _target(config: UpcycleConfig, recipe: Recipe | None, shape: ModelShape) -> Target:
    """The target that the config or the recipe asks for, or the first that fits."""
    raw, shared = own_keys(shape), config.shared or bool(recipe and recipe.shared)
    if config.target or recipe is None:
        return choose_target(raw, config.target, every=config.every, shared=shared)
    fix = "leave architecture out of the recipe"
    return choose_target(raw, recipe.target, every=config.every, shared=shared, fix=fix)


def _sizes(config: UpcycleConfig, recipe: Recipe | None, shape: ModelShape) -> tuple[int, int]:
    """How many experts there are, and how many a token uses. Raises E202."""
    slices = config.slices
    if shape.intermediate_size % slices:
        why = f"{slices} do not divide a feed-forward of {shape.intermediate_size}"
        raise ExpertlyError("E202", "slices", why, fix="choose a divisor")
    listed = len(recipe.specialists) * slices if recipe else None
    num_experts = config.num_experts or listed or _COPIES * slices
    if listed not in (None, num_experts):
        why = f"{num_experts}, but the recipe's specialists make {listed}"
        raise ExpertlyError("E202", "num_experts", why, fix="leave it out")
    asked = config.top_k or (recipe and recipe.top_k and recipe.top_k * slices)
    top_k = asked or min(2 * slices, num_experts)
    if num_experts < 1 or num_experts % slices:
        why = f"{num_experts}, expected a multiple of {slices} slices"
        raise ExpertlyError("E202", "num_experts", why, fix=f"choose {_COPIES * slices}")
    if not 1 <= top_k <= num_experts:
        why = f"{top_k}, but there are {num_experts} experts"
        raise ExpertlyError("E202", "top_k", why, fix=f"choose at most {num_experts}")
    if top_k % slices:
        why = f"{top_k}, expected a multiple of {slices}: a token needs all slices of a copy"
        raise ExpertlyError("E202", "top_k", why, fix=f"choose {slices}")
    return num_experts, top_k


def _sources(recipe: Recipe | None, dense: Dense, copies: int) -> tuple[list[int], list[Shards]]:
    """By copy the index of its source, and the sources: each specialist's folder once."""
    if recipe is None:
        return [0] * copies, [dense.weights]
    folders = [specialist.source for specialist in recipe.specialists]
    unique = list(dict.fromkeys(folders))
    opened = [
        dense.weights if folder == dense.folder else open_like(folder, dense).weights
        for folder in unique
    ]
    return [unique.index(folder) for folder in folders], opened


def _change(config: UpcycleConfig, target: Target) -> Change:
    return Change(
        slices=config.slices,
        share=0.5 if target.shared else 1.0,
        drop=config.drop,
        drop_apart=config.drop_apart,
        noise=config.noise,
        seed=config.seed,
    )


def _shape(
    dense: Dense, target: Target, layers: list[int], num_experts: int, top_k: int, slices: int
) -> ModelShape:
    """The MoE's config."""
    sizes = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": dense.shape.intermediate_size // slices,
    }
    keys = target_keys(own_keys(dense.shape), target, layers)
    return moe_config(dense.shape, target.name, {**sizes, **keys})


def _dtype(recipe: Recipe | None, dense: Dense) -> torch.dtype | None:
    """As the recipe says; float32 where norms are written out in full, and would be rounded."""
    if recipe and recipe.dtype:
        return _DTYPES[recipe.dtype]
    return torch.float32 if DENSE[dense.shape.model_type].folded else None


def _widest(shape: ModelShape, dense: Dense, sources: list[Shards]) -> torch.dtype | None:
    """The dtype to open the MoE in: the dense model's, or what holds all specialists' numbers."""
    others = [source.entry(_DOWN).dtype for source in sources if source is not dense.weights]
    own = shape.dtype
    return reduce(torch.promote_types, others, own) if isinstance(own, torch.dtype) else None


def _require_exact(slices: int, dtype: torch.dtype | None, dense: Dense) -> None:
    """Raises E202 for slices by whose number half precision cannot be multiplied unrounded."""
    dtype = dtype or dense.weights.entry(_DOWN).dtype
    if dtype.itemsize < 4 and slices & (slices - 1):
        why = f"{slices}, and {str(dtype).removeprefix('torch.')} weights times it are rounded"
        raise ExpertlyError("E202", "slices", why, fix="choose a power of 2")
