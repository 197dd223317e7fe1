"""A conversation on the command line: a line is a turn, the answer comes as it is written."""

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING

import typer

from expertly.cli.generate import print_whole, speed, write_on

if TYPE_CHECKING:
    from expertly.data.dialogues import Message
    from expertly.engine.sampler import Sampling
    from expertly.models.loading import Model, Tokenizer

_EXIT = "/exit"


def converse(
    model: "Model",
    tokenizer: "Tokenizer",
    sampling: "Sampling",
    *,
    system: str,
    prompt: str | None,
    json: bool,
) -> None:
    """Answer each line of stdin, or the prompt alone, until it ends or says /exit.

    In a terminal it asks with "> "; from a pipe the answers alone are on stdout.
    """
    from expertly.models.chat import chat_prompt, turn_ends

    ends = turn_ends(tokenizer)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for line in [prompt] if prompt is not None else _lines():
        messages.append({"role": "user", "content": line})
        text, pace = write_on(model, tokenizer, chat_prompt(tokenizer, messages), sampling, ends)
        said = []
        try:
            for piece in text:
                said.append(piece)
                if not json:
                    typer.echo(piece, nl=False)
        finally:
            if not json:
                typer.echo()  # after Ctrl-C as well
        messages.append({"role": "assistant", "content": "".join(said).strip()})
        if json:
            print_whole({"messages": messages, "text": messages[-1]["content"]}, pace)
        elif sys.stdin.isatty():
            typer.echo(speed(pace), err=True)


def _lines() -> Iterator[str]:
    """The user's lines; blank ones are passed over, and bytes that are no text shown as such."""
    asks = sys.stdin.isatty()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if asks:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line and asks:
            typer.echo(err=True)  # after Ctrl-D the shell's next line is its own
        if not line or line.strip() == _EXIT:
            return
        if line.strip():
            yield line.strip()
