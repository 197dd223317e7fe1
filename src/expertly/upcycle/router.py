"""Where each router starts: a row for each copy of the feed-forward, layer by layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.walk import walk
from expertly.upcycle.clusters import balanced_clusters
from expertly.upcycle.rows import fitted_rows, random_rows, unclear
from expertly.upcycle.setup import Job
from expertly.upcycle.text import cut_evenly, prompt_rows, text_rows

Say = Callable[[str], None]


def router_rows(job: Job, say: Say) -> dict[int, Tensor]:
    """By MoE layer the first rows of its router, (copies, dim); its slices share them.

    random: small and normal. zero: all experts alike, so it needs whole copies. clusters: fitted
    to balanced k-means of the states that the router will see, on the job's data. A recipe's
    prompts: fitted to the same states of each specialist's prompts. Raises E202 for slices of
    copies that a router cannot tell apart.
    """
    rows = _rows(job, say)
    for layer, each in rows.items():
        if job.change.slices > 1 and len(each.unique(dim=0)) < job.copies:
            why = f"copies alike in layer {layer}: a token would get slices of several"
            raise ExpertlyError("E202", "router", why, fix="give other text, or leave slices out")
    return rows


def _rows(job: Job, say: Say) -> dict[int, Tensor]:
    dim = job.shape.hidden_size
    if job.router == "hidden":
        return _from_prompts(job, say)
    if job.router == "clusters":
        return _from_clusters(job, say)
    if job.router == "zero":
        return {layer: torch.zeros(job.copies, dim) for layer in job.moe_layers}
    return {
        layer: random_rows(job.copies, dim, seed=job.config.seed + layer)
        for layer in job.moe_layers
    }


def _from_clusters(job: Job, say: Say) -> dict[int, Tensor]:
    ids = text_rows(job, 2 * job.config.tokens, held_out=False)
    say(f"router: clusters of {ids.numel():,} tokens in each layer")
    rows = {}
    for passed in walk(job.dense.shape, job.backbone, ids.unbind()):
        if passed.layer in job.moe_layers:
            labels = balanced_clusters(passed.states, job.copies, seed=job.config.seed)
            wanted = torch.nn.functional.one_hot(labels, job.copies).float()
            rows[passed.layer] = fitted_rows(passed.states, wanted)
        del passed  # its states are large, and the next layer's come on top
    return rows


def _from_prompts(job: Job, say: Say) -> dict[int, Tensor]:
    whole, wishes = _prompts(job)
    texts = cut_evenly(whole, 2 * job.config.tokens)
    count, of = sum(map(len, texts)), sum(map(len, whole))
    say(f"router: {count:,} of {of:,} tokens of {len(texts)} prompts in each layer")
    wanted, rows, poor = wishes.repeat_interleave(torch.tensor([*map(len, texts)]), dim=0), {}, 0
    for passed in walk(job.dense.shape, job.backbone, texts):
        if passed.layer in job.moe_layers:
            rows[passed.layer] = fitted_rows(passed.states, wanted)
            poor += bool(unclear(rows[passed.layer], passed.states, wanted))
        del passed
    if poor > len(rows) // 2:
        say("warning: in most layers the prompts of some specialists do not tell them apart")
    return rows


def _prompts(job: Job) -> tuple[list[Tensor], Tensor]:
    """All prompts' tokens, (seq,) each, and what each wants of the copies: (prompts, copies)."""
    assert job.recipe is not None
    texts: list[Tensor] = []
    wishes: list[Tensor] = []
    for specialist, own in zip(job.recipe.specialists, torch.eye(job.copies), strict=True):
        for prompts, sign in ((specialist.positive, 1.0), (specialist.negative, -1.0)):
            texts += prompt_rows(job, prompts)
            wishes += [sign * own] * len(prompts)
    return texts, torch.stack(wishes)
