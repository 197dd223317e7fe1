"""A little text of every domain as rows of tokens, for a look at a model; training reads all of it.

It keeps nothing on disk, and draws evenly from the documents it reads, held out or not.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from expertly.data.config import Source
from expertly.data.sources import by_domain, pieces, split_documents, spread
from expertly.errors import ExpertlyError

_BYTES_PER_TOKEN = 16  # of text for a token: twice what the sparsest tokenizers need
_PIECE = 2048  # characters, so that a few tokens come from many documents
_READ = 8 * 2**20  # characters of a domain at most, however large it is


def sample_rows(
    sources: Sequence[Source],
    encode: Callable[[list[str]], list[list[int]]],
    end_of_text: int,
    *,
    tokens: int,
    sequence_length: int,
) -> dict[str, Tensor]:
    """By domain, about `tokens` tokens of it: (rows, seq). Short texts make one shorter row.

    Raises E303 for a source without text, E304 for an unreadable row.
    """
    rows = {}
    for domain, group in by_domain(sources).items():
        texts = spread(_pieces(group), tokens * _BYTES_PER_TOKEN)
        ids = [token for text in encode(texts) for token in (*text, end_of_text)][:tokens]
        if len(ids) < 2:
            fix = "name a source with text in it"
            raise ExpertlyError("E303", f"domain {domain}", "no readable text", fix=fix)
        length = min(sequence_length, len(ids))
        whole = len(ids) // length * length
        rows[domain] = torch.tensor(ids[:whole]).view(-1, length)
    return rows


def _pieces(sources: Sequence[Source]) -> Iterator[str]:
    """The beginning of a domain's text, piece by piece."""
    read = 0
    for document, _ in split_documents(sources, 0.0, lambda *_: None):
        yield from pieces(document.text, _PIECE)
        read += len(document.text)
        if read > _READ:
            return
