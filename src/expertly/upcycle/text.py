"""The text that an upcycling reads: held-out rows for the proof, others for the routers."""

import torch
from torch import Tensor

from expertly.data.config import Source
from expertly.data.sample import sample_rows
from expertly.errors import ExpertlyError
from expertly.models.tokenizer import encode_batch, encode_prompt
from expertly.upcycle.setup import Job

_LENGTH = 512  # tokens of a row at most
_SHORTEST = 16  # tokens of a prompt that are left to it, however many there are


def text_rows(job: Job, tokens: int, *, held_out: bool) -> Tensor:
    """About so many tokens of the job's data, evenly of its domains: (rows, seq).

    held_out: of documents that training leaves out, else of the others. Raises E303 for no text,
    E304 for an unreadable row.
    """
    length = min(_LENGTH, tokens, job.dense.shape.max_position_embeddings)
    sources = [Source(path=path) for path in job.config.data]
    found = sample_rows(
        sources,
        lambda texts: encode_batch(job.tokenizer, texts),
        job.tokenizer.eos_token_id,
        tokens=tokens,
        sequence_length=length,
        held_out=held_out,
    )
    # of each domain in turn, so that a limit cuts none of them off
    domains = [list(rows.flatten().split(length)) for rows in found.values()]
    turns = [rows[i] for i in range(max(map(len, domains))) for rows in domains if i < len(rows)]
    whole = [row for row in turns if len(row) == length][: max(1, tokens // length)]
    return _known(job, torch.stack(whole) if whole else turns[0].unsqueeze(0))


def prompt_rows(job: Job, prompts: tuple[str, ...]) -> list[Tensor]:
    """The tokens of each prompt, cut where the model's positions end: (seq,) each."""
    longest = min(_LENGTH, job.dense.shape.max_position_embeddings)
    return [
        _known(job, torch.tensor(encode_prompt(job.tokenizer, prompt)[:longest]))
        for prompt in prompts
    ]


def cut_evenly(texts: list[Tensor], tokens: int) -> list[Tensor]:
    """The texts (seq,), the longest ones cut until all together have at most so many tokens.

    16 of each stay, even where that makes more.
    """
    lengths = [len(text) for text in texts]
    most = max(lengths)
    while most > _SHORTEST and sum(min(length, most) for length in lengths) > tokens:
        most -= 1
    return [text[:most] for text in texts]


def _known(job: Job, ids: Tensor) -> Tensor:
    """Raises E202 when the tokenizer makes ids that the model has no embedding for."""
    if int(ids.max()) >= job.dense.shape.vocab_size:
        why = f"it makes token {int(ids.max())}, the model has {job.dense.shape.vocab_size}"
        raise ExpertlyError("E202", "tokenizer", why, fix="put the model's own tokenizer there")
    return ids
