"""Text from token ids as they come."""

from collections.abc import Callable, Iterable, Iterator

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8  # tokens that one character may take; what is broken after them is broken for good


def pieces(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """What each token adds to the text; together they are decode(all ids).

    A character may take several tokens: it comes with its last. Tokens are decoded behind those of
    the piece before, because many tokenizers write a word's space only behind another word.
    """
    shown: list[int] = []  # tokens of the piece before
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        piece = _added(decode, shown, waiting)
        if piece.endswith(_UNFINISHED) and len(waiting) < _LONGEST:
            continue
        if piece:  # special tokens show nothing
            yield piece
            shown = waiting
        waiting = []
    if waiting:
        yield _added(decode, shown, waiting)


def _added(decode: Callable[[list[int]], str], shown: list[int], waiting: list[int]) -> str:
    return decode(shown + waiting)[len(decode(shown)) :]
