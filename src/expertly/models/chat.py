"""Conversations as a model's chat template writes them: to train on, and to ask with.

transformers renders templates in a sandbox; template.py has judged them at opening.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from expertly.data.dialogues import Completion, Dialogue, Message, Said
from expertly.data.examples import Tokens
from expertly.errors import ExpertlyError

Span = tuple[int, int]  # characters of a text, from and up to

_TAGGED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError)
_ANSWER = "\ue000answer\ue001"  # stands for what a turn says: private characters, in no text


def encode_said(tokenizer: PreTrainedTokenizerBase, said: Said) -> Tokens:
    """A row's tokens, and which of them the model learns to write.

    Of a dialogue what the assistant says and the token that ends its turn; of a completion its
    text, of a text all of it, and the end of text. Raises ValueError for a dialogue that the
    template does not take, E307 where there is none.
    """
    if isinstance(said, Dialogue):
        text = _rendered(tokenizer, said.messages)
        return _learnt(tokenizer, text, _spoken(tokenizer, said, text), plain=False)
    prompt, text = said if isinstance(said, Completion) else ("", said)
    whole = (len(prompt), len(prompt + text))
    ids, learnt = _learnt(tokenizer, prompt + text, [whole], plain=True)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return Tokens([*ids, tokenizer.eos_token_id], [*learnt, True])
    return Tokens(ids, [*learnt[:-1], True])


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens that a conversation is answered behind.

    Raises E202 for turns that the template does not take, E307 without a template.
    """
    try:
        text = _rendered(tokenizer, messages, asks=True)
    except ValueError as error:
        fix = "leave --system out, or use another template"
        raise ExpertlyError("E202", "conversation", str(error), fix=fix) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's end of text, and the template's of a turn."""
    ends = {tokenizer.eos_token_id}
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with suppress(ValueError):  # a template that wants other turns, too
        if end := _end_of_turn(tokenizer, asked).strip():
            ends.add(tokenizer.convert_tokens_to_ids(end))
    return frozenset(ends)


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises E307 for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        fix = "name a file with one: data.chat_template=FILE, or chat_template.jinja beside it"
        raise ExpertlyError("E307", _name(tokenizer), "it has no chat template", fix=fix)


def _learnt(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], *, plain: bool
) -> Tokens:
    """A text's tokens; those that any span touches are learnt.

    plain: a text of no template, where a special token that is spelled out is only text, and the
    tokenizer puts its own around it.
    """
    if not tokenizer.is_fast:
        fix = "save it with a tokenizer.json, as transformers' AutoTokenizer does"
        why = "it does not tell which characters a token stands for"
        raise ExpertlyError("E307", _name(tokenizer), why, fix=fix)
    options = {"add_special_tokens": plain, "split_special_tokens": plain, "verbose": False}
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    learnt, last = [], 0
    for start, end in encoded["offset_mapping"]:
        # many tokenizers leave blanks out of a token's characters: they follow the last token's
        start, last = min(start, last), end
        touched = any(start < until and end > since for since, until in spans)
        learnt.append(touched and start < end)
    return Tokens(list(encoded["input_ids"]), learnt)


def _spoken(tokenizer: PreTrainedTokenizerBase, said: Dialogue, text: str) -> list[Span]:
    """Where in the text the assistant says what is learnt, each up to the end of its turn."""
    if _TAGGED.search(tokenizer.get_chat_template()):
        tagged = _tagged(tokenizer, said.messages)
        return tagged[len(_tagged(tokenizer, said.messages[: said.first])) :]
    return [
        _turn(tokenizer, said.messages, place, text)
        for place, message in enumerate(said.messages)
        if message["role"] == "assistant" and place >= said.first
    ]


def _turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: int, text: str
) -> Span:
    """Where in the text one turn of the assistant is, behind its head.

    What follows it is found with another answer in its place, because templates write a turn in
    another way when more follow: without its thoughts, or with another end, which is not learnt.
    """
    if place == 0:
        raise ValueError("the assistant speaks first, before there is anything to answer")
    before = _rendered(tokenizer, messages[:place], asks=True)
    behind = _behind(tokenizer, messages, place)
    if not (text.startswith(before) and text[len(before) :].endswith(behind)):
        raise ValueError(
            f"the chat template asks for turn {place + 1} in another way than it writes it: "
            "mark what is learnt in it with {% generation %}"
        )
    end = _end_of_turn(tokenizer, messages[: place + 1])
    return len(before), len(text) - len(behind) + len(end) * behind.startswith(end)


def _behind(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: int) -> str:
    """What the template writes after the words of one turn."""
    answered = {**messages[place], "content": _ANSWER}
    text = _rendered(tokenizer, [*messages[:place], answered, *messages[place + 1 :]])
    if text.count(_ANSWER) != 1:
        raise ValueError(f"the chat template does not write turn {place + 1} once")
    return text.partition(_ANSWER)[2]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The special token, and blanks before it, that the template ends the last turn with; or ""."""
    added = {each.content for each in tokenizer.added_tokens_decoder.values() if each.special}
    special = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    pattern = rf"\s*(?:{'|'.join(map(re.escape, special))})"
    found = re.match(pattern, _behind(tokenizer, messages, len(messages) - 1)) if special else None
    return found[0] if found else ""


def _tagged(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Span]:
    """Where the template's own {% generation %} is."""
    if not messages:
        return []
    options: dict[str, Any] = {"chat_template": tokenizer.get_chat_template()}
    options |= {"return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
    with _refusing():
        rendered: Any = render_jinja_template([list(messages)], **options)
    return list(rendered[1][0])


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, asks: bool = False
) -> str:
    """The conversation as text. asks: with the head of the answer. Raises ValueError."""
    require_template(tokenizer)
    with _refusing():
        said: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asks
        )
    return str(said)


@contextmanager
def _refusing() -> Iterator[None]:
    """What a template raises, as a ValueError in one line."""
    try:
        yield
    except _RENDERING as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"the chat template refuses it ({why})") from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or "the tokenizer")
