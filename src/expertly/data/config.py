"""What a user says about data: the sources and how they become rows."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that documents come from.

    `path` is a text file, a folder, a glob, a .jsonl/.json/.parquet file, `hf:NAME` or
    `hf:ORG/NAME/CONFIG` (datasets), or built in: `stdlib[:code|docs|tables]`,
    `site[:code|headers|texts]`. In a folder, .json files are text, .jsonl files are rows.
    """

    path: str
    domain: str = ""  # "": the path's stem; sources of one domain are one stream of tokens
    weight: float | None = None  # share of the training rows; None: by the domain's tokens
    column: str = "text"  # where rows keep their text
    split: str = "train"  # of an `hf:` dataset
    eval: bool = False  # True: every document is held out from training


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `data` section of a training config."""

    sources: tuple[Source, ...]
    sequence_length: int = 512  # tokens per row
    tokenizer: str = ""  # a folder; "": train a byte-level BPE on the training documents
    vocab_size: int = 4096  # of a trained tokenizer
    eval_fraction: float = 0.05  # of the documents are held out, in whole percents
    eval_tokens: int = 65536  # at most, per domain and evaluation
    skip_bad: bool = False  # leave unreadable rows out, and count them, instead of stopping
    cache_dir: str = ""  # of token files; "": $XDG_CACHE_HOME/expertly/tokens
    conversations: bool = False  # rows are dialogues or texts of their own, kept apart
    chat_template: str = ""  # a Jinja file; "": the tokenizer's own

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if not self.sources:
            yield "sources", "must name at least one source"
        if self.sequence_length < 2:
            yield "sequence_length", "must be at least 2"
        if self.vocab_size < 257:
            yield "vocab_size", "must be at least 257: the bytes and the end of text"
        if not 0 <= self.eval_fraction < 1:
            yield "eval_fraction", "must be from 0 to below 1"
        # floats: 100 * 0.07 is a little above 7
        elif abs(100 * self.eval_fraction - round(100 * self.eval_fraction)) > 1e-6:
            yield "eval_fraction", "must be in whole percents, as 0.05"
        if self.eval_tokens < 2:
            yield "eval_tokens", "must be at least 2"
