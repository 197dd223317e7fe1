"""Several specialists of one base model, listed in the words of mergekit-moe's YAML.

What can be said exactly is read; what would be silently something else is refused by name. Ours
alone is `backbone: average` (Branch-Train-MiX, arXiv 2403.07816).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from expertly.config import load
from expertly.errors import ExpertlyError

_HIDDEN = ("hidden", "hidden_avg", "hidden_last")
_ON_THE_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
_ARCHITECTURES = {None: "", "mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """One of the listed experts."""

    source_model: str
    positive_prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if not self.source_model.strip():
            yield "source_model", "is empty"
        if self.noise_scale:
            yield "noise_scale", "is not read; give --noise for all experts"
        if self.residual_scale not in (None, 1.0):
            yield "residual_scale", "would change a specialist; only 1 is read"


@dataclass(frozen=True, kw_only=True)
class _File:
    """The file's keys."""

    base_model: str
    experts: tuple[_Expert, ...]
    gate_mode: Literal[
        "hidden", "hidden_avg", "hidden_last", "random", "uniform_random", "cheap_embed"
    ] = "hidden"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    experts_per_token: int | None = None
    architecture: Literal["mixtral", "qwen", "qwen3"] | None = None
    shared_experts: tuple[_Expert, ...] | None = None
    tokenizer: Any = None
    tokenizer_source: str | None = None
    backbone: Literal["base", "average"] = "base"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        count, top_k = len(self.experts), self.experts_per_token
        own = (None, "base", self.base_model)
        wrong = {
            "base_model": not self.base_model.strip() and "is empty",
            "experts": count < 2 and "must list at least two",
            "gate_mode": self.gate_mode == "cheap_embed"
            and "cheap_embed routes by words alone; hidden sees what the router sees",
            "experts_per_token": top_k is not None
            and not 1 <= top_k <= count
            and f"must be from 1 to {count}",
            "shared_experts": self._unsaid(),
            "tokenizer": self.tokenizer not in (None, *({"source": name} for name in own))
            and "is the base model's; leave it out",
            "tokenizer_source": self.tokenizer_source not in own
            and "is the base model; leave it out",
        }
        yield from ((leaf, why) for leaf, why in wrong.items() if why)
        yield from self._silent()

    def _unsaid(self) -> str:
        """Why the shared experts cannot be made as they are described, or nothing."""
        shared = self.shared_experts or ()
        if [Path(each.source_model) for each in shared] not in ([], [Path(self.base_model)]):
            return "only the base model itself can be the shared expert"
        prompts = any(each.positive_prompts or each.negative_prompts for each in shared)
        if self.gate_mode in _HIDDEN and prompts:
            return "must have no prompts: its gate starts at one half for every token"
        return ""

    def _silent(self) -> Iterator[tuple[str, str]]:
        """Experts without a prompt, where prompts route, and prompts without a word."""
        for number, expert in enumerate(self.experts if self.gate_mode in _HIDDEN else ()):
            if not expert.positive_prompts:
                yield f"experts.{number}.positive_prompts", f"{self.gate_mode} needs some"
            for leaf in ("positive_prompts", "negative_prompts"):
                if not all(prompt.strip() for prompt in getattr(expert, leaf) or ()):
                    yield f"experts.{number}.{leaf}", "has an empty prompt"


class Specialist(NamedTuple):
    """A model whose feed-forwards become experts, and texts that should get there, or not."""

    source: Path
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A merge."""

    base: Path
    specialists: tuple[Specialist, ...]
    gate_mode: Literal["hidden", "random"]
    top_k: int | None
    dtype: str | None
    backbone: Literal["base", "average"]
    shared: bool
    target: str  # model_type, or ""


def read_recipe(file: Path) -> Recipe:
    """A merge from its YAML; folders are relative to the file, or else to where one stands.

    gate_mode hidden, hidden_avg and hidden_last are one here: all positions of the prompts, in the
    state that the router really sees. Raises E201 and E202 for keys and values, E203 for a file
    that cannot be read, E305 for a model that is no folder here.
    """
    said = load(_File, file)
    listed = [
        Specialist(
            source=_folder(each.source_model, file),
            positive=each.positive_prompts or (),
            negative=each.negative_prompts or (),
        )
        for each in said.experts
    ]
    return Recipe(
        base=_folder(said.base_model, file),
        specialists=tuple(listed),
        gate_mode="hidden" if said.gate_mode in _HIDDEN else "random",
        top_k=said.experts_per_token,
        dtype=said.dtype,
        backbone=said.backbone,
        shared=bool(said.shared_experts),
        target=_ARCHITECTURES[said.architecture],
    )


def _folder(name: str, file: Path) -> Path:
    for path in (file.parent / name, Path(name)):
        if os.path.isdir(path):  # not Path.is_dir, which raises for a name that is too long
            return path
    fix = (
        f"hf download {name} --local-dir DIR, then name DIR"
        if _ON_THE_HUB.fullmatch(name)
        else "correct it"
    )
    raise ExpertlyError("E305", f"{file}: {name}", "no such folder", fix=fix)
