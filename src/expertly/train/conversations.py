"""The data of a fine-tuning run: conversations kept apart, and text of the base's own domains.

That text is read in evaluations only, so that forgetting shows beside what is learnt.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from expertly.data.batches import Batches
from expertly.data.config import DataConfig, Source
from expertly.data.examples import Example, ExampleSet, read_examples
from expertly.data.hub import PREFIX
from expertly.data.packing import PackedSet, packed_eval_batches
from expertly.data.sample import sample_rows
from expertly.data.sources import domain_weights
from expertly.errors import ExpertlyError
from expertly.models.apart import keeps_apart
from expertly.models.chat import encode_said
from expertly.models.loading import Model, Tokenizer
from expertly.models.template import check_template
from expertly.models.tokenizer import encode_batch, open_tokenizer
from expertly.train.config import TrainConfig
from expertly.train.text import Data, Say

_ROWS = (".json", ".jsonl", ".parquet")  # files of rows; an eval source of another kind is text
_BASE = "base:"  # before the name of a domain of the base's own
# counts of what a domain lost, and what is said of them
_LOST = {
    "cut": "cut to data.sequence_length",
    "unlearnable": "without a turn to learn, left out",
    "bad": "unreadable, left out",
    "undecodable": "not UTF-8, left out",
    "duplicates": "copies, left out",
}


def read_conversations(config: TrainConfig, folder: Path | None, say: Say) -> Data:
    """Rows of examples that are kept apart, in the words of a model's chat template.

    folder: the model's. Raises what read_examples does, E307 without a template, E203 and E311 for
    a template's file.
    """
    data = config.data
    tokenizer = open_tokenizer(data.tokenizer or str(folder))
    if data.chat_template:
        tokenizer.chat_template = _read_template(Path(data.chat_template))
    rows = [source for source in data.sources if not source.eval or _has_rows(source)]
    sets = read_examples(
        rows,
        partial(encode_said, tokenizer),
        length=data.sequence_length,
        eval_fraction=data.eval_fraction,
        skip_bad=data.skip_bad,
    )
    for each in sets:
        say(_told(each))
    sets += _of_base(data, tokenizer, say)
    return in_rows(config, tokenizer, sets)


def in_rows(
    config: TrainConfig, tokenizer: Tokenizer, sets: list[ExampleSet], *, together: bool = True
) -> Data:
    """Sets as rows to train on and to evaluate. together: whether examples share rows."""
    length, size = config.data.sequence_length, config.schedule.per_device_train_batch_size
    batches = Batches(
        [PackedSet(each, length, together=together) for each in sets],
        domain_weights(config.data.sources),
        batch_size=size,
        sequence_length=length,
        seed=config.seed,
    )
    held_out = packed_eval_batches(
        sets,
        batch_size=size,
        sequence_length=length,
        eval_tokens=config.data.eval_tokens,
        together=together,
    )
    return Data(tokenizer, sets, batches, held_out)


def kept_apart(config: TrainConfig, model: Model, data: Data, say: Say) -> Data:
    """The same examples, each in a row of its own where the model mixes those that share one."""
    if keeps_apart(model):
        return data
    say(f"data: {model.config.model_type} mixes texts that share a row: each gets one of its own")
    return in_rows(config, data.tokenizer, cast(list[ExampleSet], data.sets), together=False)


def _read_template(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read ({error})"
        raise ExpertlyError("E203", str(file), why, fix="correct data.chat_template") from error
    check_template(text, str(file))
    return text


def _has_rows(source: Source) -> bool:
    return source.path.startswith(PREFIX) or source.path.endswith(_ROWS)


def _of_base(data: DataConfig, tokenizer: Tokenizer, say: Say) -> list[ExampleSet]:
    """Text of each eval source that holds no rows, about eval_tokens of a domain."""
    sources = [source for source in data.sources if source.eval and not _has_rows(source)]
    if not sources:
        return []
    found = sample_rows(
        sources,
        partial(encode_batch, tokenizer),
        tokenizer.eos_token_id,
        tokens=data.eval_tokens,
        sequence_length=data.sequence_length,
    )
    for domain, ids in found.items():
        say(f"data: {_BASE}{domain}: {ids.numel():,} tokens, for evaluation only")
    return [_as_examples(f"{_BASE}{domain}", ids) for domain, ids in found.items()]


def _as_examples(domain: str, ids: Tensor) -> ExampleSet:
    """Each row (rows, seq) an example that is held out."""
    examples = [
        Example(f"{domain}:{place}", row.astype(np.int32), np.ones(len(row), dtype=bool))
        for place, row in enumerate(ids.numpy(), start=1)
    ]
    counts = Counter(held_out_documents=len(examples), held_out_tokens=ids.numel())
    return ExampleSet(domain, [], examples, counts)


def _told(each: ExampleSet) -> str:
    """A domain's line: its examples, and what was left out."""
    counts = each.counts
    line = (
        f"data: {each.domain}: {counts['documents']:,} examples to train on, {counts['learnt']:,} "
        f"of {counts['tokens']:,} tokens learnt; {counts['held_out_documents']:,} held out"
    )
    lost = [f"{counts[key]:,} {why}" for key, why in _LOST.items() if counts[key]]
    return f"{line} ({'; '.join(lost)})" if lost else line
