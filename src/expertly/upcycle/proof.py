"""The proof of an upcycling: the written MoE and the dense model on the same held-out text.

Both are walked layer by layer in float32, the MoE from the files that were just written.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.config import dump
from expertly.models.adapter_files import base_marks
from expertly.models.build import ModelShape
from expertly.models.inspect import Inspection, inspect_folder
from expertly.models.walk import Difference, Head, Weights, compare, walk
from expertly.receipts import Check, Receipt, fingerprint, versions
from expertly.upcycle.layout import Made
from expertly.upcycle.setup import Job

# float32 sums in another order: so much, or this share of the largest logit, is no difference
_LIMIT, _SHARE = 1e-4, 1e-5
_MIXED = "tokens_with_mixed_slices_in_16_bits"


class Proof(NamedTuple):
    """What was found."""

    difference: Difference
    limit: float | None  # of the largest difference; None: the function changed on purpose
    written: Inspection
    tokens: int
    mixed: int | None  # that get slices of several copies in 16 bits; None: there are no slices

    @property
    def perplexities(self) -> list[float]:
        """The dense model's, or the base's, and the MoE's."""
        return [math.exp(loss) for loss in self.difference.losses]


def prove(job: Job, folder: Path, ids: Tensor) -> Proof:
    """Read both models again and compare them on ids (rows, seq)."""
    made = Made(folder, job.target, job.num_experts)
    moe, mixed = _last_and_mixed(job, made, ids)
    hidden = [_last(job.dense.shape, job.dense.weights, ids), moe]
    tied = "model.embed_tokens.weight" if job.shape.tie_word_embeddings else "lm_head.weight"
    heads = [Head(job.dense.weights, job.dense.head), Head(made, tied)]
    difference = compare(hidden, heads, job.shape.vocab_size, ids)
    limit = max(_LIMIT, _SHARE * difference.scale) if job.exact else None
    return Proof(difference, limit, inspect_folder(folder), ids.numel(), mixed)


def _last(shape: ModelShape, weights: Weights, ids: Tensor) -> list[Tensor]:
    """What a model's head is given: by row (seq, dim)."""
    for passed in walk(shape, weights, ids.unbind()):
        hidden = passed.hidden
        del passed  # its states are large, and the next layer's come on top
    return hidden


def _last_and_mixed(job: Job, made: Made, ids: Tensor) -> tuple[list[Tensor], int | None]:
    """The same of the MoE, and how many tokens get mixed slices in 16 bits, where it has slices."""
    if job.change.slices == 1:
        return _last(job.shape, made, ids), None
    mixed = torch.zeros(ids.numel(), dtype=torch.bool)
    for passed in walk(job.shape, made, ids.unbind()):
        hidden = passed.hidden
        if passed.layer in job.moe_layers:
            router = made.tensor(f"model.layers.{passed.layer}.mlp.gate.weight")
            mixed |= mixed_slices(passed.states, router, job.top_k, job.change.slices)
        del passed
    return hidden, int(mixed.sum())


def mixed_slices(states: Tensor, router: Tensor, top_k: int, slices: int) -> Tensor:
    """Which tokens get some slices of a copy and not all of them in 16 bits: (tokens,) of bool.

    states: (tokens, dim); router: (experts, dim), equal rows for the slices of a copy. bfloat16
    has so few logits that those of two copies may be the same one, and then chance chooses.
    """
    logits = states.bfloat16() @ router.bfloat16().T
    copies = logits.topk(top_k, dim=1).indices // slices
    counts = torch.nn.functional.one_hot(copies, len(router) // slices).sum(dim=1)
    return (counts % slices != 0).any(dim=1)


def receipt_of(job: Job, proof: Proof, expected: int, cost: dict[str, float]) -> Receipt:
    """The receipt. expected: the MoE's parameters; cost: seconds and bytes of the job."""
    largest, written = proof.difference.largest, proof.written
    loss = proof.difference.losses[1]
    checks = [
        Check("saved parameters", written.total == expected, written.total, expected),
        Check("the MoE's loss is a number", math.isfinite(loss), loss),
    ]
    if proof.limit is not None:
        name = "largest logit difference to the dense model"
        checks.append(Check(name, largest <= proof.limit, largest, proof.limit))
    dense, made = proof.perplexities
    return Receipt(
        job="upcycle",
        inputs={"config": dump(job.config), "dense": _source(job.dense.folder)},
        versions=versions("torch", "transformers", "safetensors"),
        changed=_changed(job),
        checks=tuple(checks),
        figures={
            "largest_logit_difference": largest,
            "function": "unchanged" if job.exact else "changed on purpose",
            "perplexity": {"dense": dense, "moe": made},
            "held_out_tokens": proof.tokens,
            "parameters": written.total,
            "active_parameters": written.active,
            **({} if proof.mixed is None else {_MIXED: proof.mixed}),
            "bytes": sum(written.bytes.values()),
            **cost,
        },
    )


def _source(folder: Path) -> dict[str, Any]:
    """Where a dense model is, and what tells it from one that was trained on in place."""
    config = fingerprint(folder / "config.json")
    return {
        "path": str(folder.resolve()),
        "config": config,
        "weights": base_marks(folder)["weights"],
    }


def _changed(job: Job) -> dict[str, Any]:
    """What became of the feed-forwards, and how routers begin."""
    recipe = job.recipe
    return {
        "method": "specialists" if recipe else "copies" if job.change.slices == 1 else "slices",
        "target": job.target.name,
        "copies": job.copies,
        "slices": job.change.slices,
        "layers": job.moe_layers,
        "drop": job.change.drop,
        "noise": job.change.noise,
        "shared": job.target.shared,
        "router": job.router,
        "specialists": [_source(each.source) for each in recipe.specialists] if recipe else [],
    }
