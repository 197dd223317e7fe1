"""Where each router starts: a row for each copy of the feed-forward, layer by layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.walk import walk
from expertly.upcycle.clusters import balanced_clusters
from expertly.upcycle.rows import fitted_rows, random_rows, unclear
from expertly.upcycle.setup import Job
from expertly.upcycle.text import prompt_rows, text_rows

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
    if job.recipe and job.recipe.gate_mode == "hidden":
        return _from_prompts(job, say)
    if job.config.router == "clusters":
        return _from_clusters(job, say)
    if job.config.router == "zero":
        return {layer: torch.zeros(job.copies, dim) for layer in job.moe_layers}
    return {
        layer: random_rows(job.copies, dim, seed=job.config.seed + layer)
        for layer in job.moe_layers
    }


def _from_clusters(job: Job, say: Say) -> dict[int, Tensor]:
    ids = text_rows(job, 2 * job.config.tokens, held_out=False)
    say(f"router: clusters of {ids.numel():,} tokens in each layer")
    rows = {}
    for passed in walk(job.dense.shape, job.backbone, ids):
        if passed.layer in job.moe_layers:
            labels = balanced_clusters(passed.states, job.copies, seed=job.config.seed)
            wanted = torch.nn.functional.one_hot(labels, job.copies).float()
            rows[passed.layer] = fitted_rows(passed.states, wanted)
    return rows


def _from_prompts(job: Job, say: Say) -> dict[int, Tensor]:
    assert job.recipe is not None
    texts: list[Tensor] = []
    marks: list[Tensor] = []
    for copy, specialist in enumerate(job.recipe.specialists):
        for prompts, sign in ((specialist.positive, 1.0), (specialist.negative, -1.0)):
            for ids in prompt_rows(job, prompts):
                mark = torch.zeros(len(ids), job.copies)
                mark[:, copy] = sign
                texts.append(ids)
                marks.append(mark)
    say(f"router: {sum(map(len, texts)):,} tokens of {len(texts)} prompts in each layer")
    # causal, so padding behind a prompt does not reach it
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    wanted, rows, poor = torch.cat(marks), {}, 0
    for passed in walk(job.dense.shape, job.backbone, ids):
        if passed.layer in job.moe_layers:
            states = passed.states[real.flatten().bool()]
            rows[passed.layer] = fitted_rows(states, wanted)
            poor += bool(unclear(rows[passed.layer], states, wanted))
    if poor > len(rows) // 2:
        say("warning: in most layers the prompts of some specialists do not tell them apart")
    return rows
