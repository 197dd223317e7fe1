"""A little text of every domain as rows of tokens, for a look at a model; training reads all of it.

It keeps nothing on disk, and draws evenly from the documents it reads.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from expertly.data.config import DataConfig, Source
from expertly.data.sources import by_domain, pieces, split_documents, spread
from expertly.errors import ExpertlyError

_BYTES_PER_TOKEN = 16  # of text for a token: twice what the sparsest tokenizers need
_PIECE = 2048  # characters, so that a few tokens come from many documents
_READ = 8 * 2**20  # characters of a domain at most, however large it is
_PASSED = 128 * 2**20  # and of its other documents, where held-out ones are one in twenty


def sample_rows(
    sources: Sequence[Source],
    encode: Callable[[list[str]], list[list[int]]],
    end_of_text: int,
    *,
    tokens: int,
    sequence_length: int,
    held_out: bool | None = None,
) -> dict[str, Tensor]:
    """By domain, about `tokens` tokens of it: (rows, seq). Short texts make one shorter row.

    held_out: of documents that training leaves out, by its default, or of the others; a domain
    without any such gives of all.
    Raises E303 for a source without text, E304 for an unreadable row.
    """
    rows = {}
    for domain, group in by_domain(sources).items():
        limit = tokens * _BYTES_PER_TOKEN
        texts = spread(_pieces(group, held_out), limit) or spread(_pieces(group, None), limit)
        encoded = encode(texts) if texts else []  # which not every tokenizer takes
        ids = [token for text in encoded for token in (*text, end_of_text)][:tokens]
        if len(ids) < 2:
            fix = "name a source with text in it"
            raise ExpertlyError("E303", f"domain {domain}", "no readable text", fix=fix)
        length = min(sequence_length, len(ids))
        whole = len(ids) // length * length
        rows[domain] = torch.tensor(ids[:whole]).view(-1, length)
    return rows


def _pieces(sources: Sequence[Source], held_out: bool | None) -> Iterator[str]:
    """The beginning of a domain's text, piece by piece."""
    read = passed = 0
    for document, out in split_documents(sources, DataConfig.eval_fraction, lambda *_: None):
        if held_out is not None and out != held_out:
            passed += len(document.text)
        else:
            yield from pieces(document.text, _PIECE)
            read += len(document.text)
        if read > _READ or passed > _PASSED:
            return
