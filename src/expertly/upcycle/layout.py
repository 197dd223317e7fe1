"""What is written where: every tensor of the MoE, in order, and how it comes from the dense one.

Names are the target's on disk. `Made` reads them back under the names in the model, where experts
are stacked.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.shards import Average, Entry, Shards
from expertly.upcycle.experts import MATRICES, Place, expert_matrix
from expertly.upcycle.setup import Job
from expertly.upcycle.targets import Target

_FEED_FORWARD = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_NORM = re.compile(r"norm\.weight$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Part(NamedTuple):
    """A tensor of the MoE, and what it comes from."""

    entry: Entry
    role: str  # backbone, expert, shared, router, shared gate
    source: str = ""  # the dense tensor's name
    place: Place = Place(0, 0, 0)


def parts(job: Job) -> list[Part]:
    """All tensors of the MoE, in the dense files' order."""
    made: list[Part] = []
    for name in job.dense.names:
        found = _FEED_FORWARD.fullmatch(name)
        if found is None or int(found[1]) not in job.moe_layers:
            made.append(_kept(job, name, name))
        elif found[2] == "gate":
            made += _layer(job, int(found[1]))
    if _HEAD not in job.dense.names and not job.shape.tie_word_embeddings:
        made.append(_kept(job, _HEAD, _EMBEDDING))  # Gemma's embeddings no longer serve as its head
    return made


def _kept(job: Job, name: str, source: str) -> Part:
    return Part(_as(job, name, source), "backbone", source)


def _as(job: Job, name: str, source: str, shape: tuple[int, ...] | None = None) -> Entry:
    """A tensor with the dtype of what it comes from, and its shape if none is said."""
    there = job.backbone.entry(source)
    return Entry(name, job.dtype or there.dtype, there.shape if shape is None else shape)


def _layer(job: Job, layer: int) -> Iterator[Part]:
    """The tensors of one MoE layer's block."""
    target, prefix = job.target, f"model.layers.{layer}.{job.target.block}"
    dim, width = job.shape.hidden_size, job.width
    sources = [f"model.layers.{layer}.mlp.{name}.weight" for name in MATRICES]
    shapes = [(width, dim), (width, dim), (dim, width)]
    # all specialists' numbers must fit, whatever the base has
    dtypes = [job.dtype or Average(job.sources).entry(source).dtype for source in sources]
    router = Entry(f"{prefix}.gate.weight", dtypes[0], (job.num_experts, dim))
    yield Part(router, "router", place=Place(layer, 0, 0))
    for expert in range(job.num_experts):
        for matrix, name in enumerate(target.matrices):
            name = f"{prefix}.experts.{expert}.{name}.weight"
            entry = Entry(name, dtypes[matrix], shapes[matrix])
            yield Part(entry, "expert", sources[matrix], Place(layer, expert, matrix))
    if target.shared:
        for name, source in zip(MATRICES, sources, strict=True):
            yield Part(_as(job, f"{prefix}.shared_expert.{name}.weight", source), "shared", source)
        gate = _as(job, f"{prefix}.shared_expert_gate.weight", sources[0], (1, dim))
        yield Part(gate, "shared gate")


def values(job: Job, made: list[Part], rows: dict[int, Tensor]) -> Iterator[Iterator[Tensor]]:
    """The numbers of each part, block by block. rows: per MoE layer its router's, one a copy."""
    held: dict[tuple[int, str], Tensor] = {}  # the dense matrices of the layer at hand
    for part in made:
        if part.role == "router":
            held.clear()
        yield _cast(job, part, _blocks(job, part, rows, held))


def _cast(job: Job, part: Part, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The blocks in the part's dtype; E301 for NaN or infinity, the files' or for want of range."""
    for block in blocks:
        cast = block.to(part.entry.dtype)
        if not _finite(cast):
            raise _unsayable(job, part)
        yield cast


def _finite(block: Tensor) -> bool:
    # one pass without a temporary; a NaN comes through it
    return not block.numel() or all(bool(end.isfinite()) for end in block.aminmax())


def _unsayable(job: Job, part: Part) -> ExpertlyError:
    """The E301 for a part with numbers that are none: of which folder, or for want of range."""
    name, models = part.source or part.entry.name, [job.dense.weights]
    if part.role == "expert":
        models = [job.sources[job.whose[part.place.expert // job.change.slices]]]
    elif part.role == "backbone" and isinstance(job.backbone, Average):
        models = job.sources
    for model in models if part.source else ():
        if not all(map(_finite, model.blocks(name))):
            why = f"{name} holds NaN or infinity"
            return ExpertlyError("E301", str(model.folder), why, fix="copy the model again")
    dtype = str(part.entry.dtype).removeprefix("torch.")
    why = f"{name} holds what {dtype} cannot say"
    return ExpertlyError("E301", str(models[0].folder), why, fix="choose float32 or fewer slices")


def _blocks(
    job: Job, part: Part, rows: dict[int, Tensor], held: dict[tuple[int, str], Tensor]
) -> Iterator[Tensor]:
    if part.role == "backbone":
        yield from _backbone(job, part)
    elif part.role == "router":
        yield rows[part.place.layer].repeat_interleave(job.change.slices, dim=0)
    elif part.role == "shared gate":
        yield torch.zeros(part.entry.shape)  # a sigmoid of it is a half
    elif part.role == "shared":
        yield from job.dense.weights.blocks(part.source)
    else:
        copy = part.place.expert // job.change.slices
        key = (job.whose[copy], part.source)
        if key not in held:
            held[key] = job.sources[key[0]].tensor(part.source)
        yield expert_matrix(held[key], job.change, part.place)


def _backbone(job: Job, part: Part) -> Iterator[Tensor]:
    """A tensor outside of the experts; Gemma's norms and embeddings say in full what they mean."""
    for block in job.backbone.blocks(part.source):
        if job.folded and _NORM.search(part.entry.name):
            block = block.float() + 1
        elif job.folded and part.entry.name == _EMBEDDING:
            block = block.float() * job.shape.hidden_size**0.5
        yield block


class Made(Shards):
    """The written MoE under the names of its model: experts in stacks, float32."""

    def __init__(self, folder: Path, target: Target, num_experts: int):
        super().__init__(folder)
        self._target, self._num_experts = target, num_experts

    def tensor(self, name: str) -> Tensor:
        """A parameter of the model; gate_up_proj (experts, 2 x ff, dim), down_proj (experts, dim,
        ff)."""
        block, _, leaf = name.rpartition(".experts.")
        gate, up, down = self._target.matrices
        if leaf == "down_proj":
            return self._stack(block, [down])
        if leaf == "gate_up_proj":
            return self._stack(block, [gate, up])
        if name.endswith(".mlp.gate.weight"):
            return super().tensor(self._on_disk(name))
        return super().tensor(name)

    def _stack(self, block: str, matrices: list[str]) -> Tensor:
        """The matrices of all experts, one below the other: filled in place, so held once."""
        stem = f"{self._on_disk(block)}.experts."
        rows, columns = self.entry(f"{stem}0.{matrices[0]}.weight").shape
        stack = torch.empty(self._num_experts, len(matrices) * rows, columns)
        for expert in range(self._num_experts):
            for i, matrix in enumerate(matrices):
                read = super().tensor(f"{stem}{expert}.{matrix}.weight")
                stack[expert, i * rows : (i + 1) * rows] = read
        return stack

    def _on_disk(self, name: str) -> str:
        return name.replace(".mlp", f".{self._target.block}", 1)
