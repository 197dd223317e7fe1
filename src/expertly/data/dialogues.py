"""What a row of a data set for fine-tuning says: a text, a prompt and its completion, a dialogue.

A row is judged by its own columns, so formats may be mixed. Here nothing is read and no template
known.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's words for them
_FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
FORMATS = "messages, prompt and completion, conversations, or text"

Message = dict[str, str]  # role, content and other texts, as chat templates take them


class Dialogue(NamedTuple):
    """Turns of several roles; what the assistant says is learnt."""

    messages: list[Message]
    first: int = 0  # of the messages that are learnt; those before are the prompt


class Completion(NamedTuple):
    """A text and how it goes on, without any template; the latter is learnt."""

    prompt: str
    text: str


Said = Dialogue | Completion | str  # a text by itself is learnt as a whole


def said_in(row: Mapping[str, Any]) -> Said:
    """What a row says. Raises ValueError, with the reason, for one that says nothing."""
    if row.get("messages") is not None:
        return Dialogue(_messages(row["messages"], "messages"))
    if row.get("conversations") is not None:
        return Dialogue(_messages(_shared(row["conversations"]), "conversations"))
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _completion(row["prompt"], row["completion"])
    if row.get("text") is not None:
        return _filled(row["text"], "text")
    there = ", ".join(map(str, row)) or "none"
    raise ValueError(f"has none of the columns {FORMATS}, but {there:.80}")


def _completion(prompt: object, completion: object) -> Said:
    """Of texts, or of messages, as TRL has both."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(_text(prompt, "prompt"), _filled(completion, "completion"))
    before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
    return Dialogue(before + after, len(before))


def _messages(said: object, column: str) -> list[Message]:
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise ValueError(f"{column} holds {_kind(said)}, not a list of messages")
    if not said:
        raise ValueError(f"{column} is empty")
    return [_message(each, f"{column}[{place}]") for place, each in enumerate(said)]


def _message(said: object, where: str) -> Message:
    if not isinstance(said, Mapping) or not {"role", "content"} <= said.keys():
        raise ValueError(f"{where} is no message with role and content")
    role = said["role"]
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r:.40}, not one of {', '.join(ROLES)}")
    if said.get("tool_calls"):
        raise ValueError(f"{where} calls a tool, which only a text can say here")
    # what else a template may ask for, as a model's thoughts
    texts = {key: _text(each, where) for key, each in said.items() if isinstance(each, str)}
    return {**texts, "role": role, "content": _content(said["content"], where)}


def _content(said: object, where: str) -> str:
    """A text, or the texts of its parts."""
    if isinstance(said, Sequence) and not isinstance(said, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in said]
        if all(isinstance(part, str) for part in parts):
            said = "".join(map(str, parts))
    return _text(said, where)


def _shared(said: object) -> object:
    """ShareGPT's turns as messages; what is none of them stays, to be refused."""
    if not isinstance(said, Sequence) or isinstance(said, str):
        return said
    return [_turn(each) if isinstance(each, Mapping) else each for each in said]


def _turn(said: Mapping[str, Any]) -> Mapping[str, Any]:
    if "from" not in said or "value" not in said:
        return said
    return {"role": _FROM.get(str(said["from"]), said["from"]), "content": said["value"]}


def _filled(said: object, where: str) -> str:
    text = _text(said, where)
    if not text.strip():
        raise ValueError(f"{where} is empty")
    return text


def _text(said: object, where: str) -> str:
    if not isinstance(said, str):
        raise ValueError(f"{where} holds {_kind(said)}, not a text")
    try:
        said.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds a lone surrogate at character {error.start}") from error
    return said


def _kind(said: object) -> str:
    return "nothing" if said is None else type(said).__name__


def no_assistant(where: str) -> ExpertlyError:
    """The E304 for data in which nothing is to be learnt."""
    fix = "give rows with an assistant's turn, a completion or a text"
    return ExpertlyError("E304", where, "has no assistant turn in it", fix=fix)
