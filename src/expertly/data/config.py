"""What a user says about data: the sources and how they become rows."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that documents come from.

    `path` is a text file, a folder, a glob, a .jsonl/.json/.parquet file, `hf:NAME` or
    `hf:ORG/NAME/CONFIG` (datasets), or built in: `stdlib[:code|docs|tables]`,
    `site[:code|headers|texts]`.
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
    cache_dir: str = ""  # of token files; "": $XDG_CACHE_HOME/expertly/tokens
