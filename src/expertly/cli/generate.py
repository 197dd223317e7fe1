"""expertly generate: write text with a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertly.cli.options import Json, print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expertly.engine.generate import Pace
    from expertly.engine.sampler import Sampling
    from expertly.models.loading import Model, Tokenizer


def generate(
    folder: Annotated[
        Path,
        typer.Argument(help="A Hugging Face model folder, or an adapter's.", show_default=False),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="What the text begins with, or with --chat the only question."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="A conversation, a line a turn; /exit ends it.")
    ] = False,
    system: Annotated[
        str, typer.Option(help="With --chat: how the model is to answer.", show_default="as usual")
    ] = "",
    bits: Annotated[
        int | None,
        typer.Option(help="Pack the weights while they load: 4, 8 or 16.", show_default=False),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 or 128.", show_default="32"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="How much to write.", show_default="100, with --chat 512"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    json: Json = False,
) -> None:
    """Continue a prompt, and say how fast; or hold a conversation.

    Example: expertly generate runs/demo/moe/checkpoint-300 --bits 4 --prompt "def main("
    Example: expertly generate runs/chat/checkpoint-120 --chat
    """
    from expertly.cli.chat import converse
    from expertly.engine.sampler import Sampling
    from expertly.models.adapter_files import base_of
    from expertly.models.chat import require_template
    from expertly.models.loading import open_config, open_model
    from expertly.models.packed_loading import choose_device
    from expertly.models.tokenizer import encode_prompt, open_tokenizer

    _check_options(prompt, system, chat=chat, json=json)
    open_config(base_of(folder))  # transformers' tokenizers read it, whatever it holds
    device = choose_device(base_of(folder), bits)
    tokenizer = open_tokenizer(folder)
    if chat:
        require_template(tokenizer)
    model = open_model(folder, device=device, bits=bits, group_size=group_size)
    most = max_new_tokens or (512 if chat else 100)
    sampling = Sampling(most, temperature, top_p, seed)
    if chat:
        converse(model, tokenizer, sampling, system=system, prompt=prompt, json=json)
        return
    text, pace = write_on(model, tokenizer, encode_prompt(tokenizer, prompt or ""), sampling)
    if json:
        print_whole({"prompt": prompt or "", "text": "".join(text)}, pace)
    else:
        _stream(prompt or "", text, pace)


def _check_options(prompt: str | None, system: str, *, chat: bool, json: bool) -> None:
    """Raises E208 for options that do not go together, and for texts that are none."""
    from expertly.errors import ExpertlyError

    if chat and json and prompt is None:
        raise ExpertlyError("E208", "--json", "says one answer", fix="add --prompt TEXT")
    if system and not chat:
        raise ExpertlyError("E208", "--system", "is for conversations", fix="add --chat")
    for name, text in (("--prompt", prompt or ""), ("--system", system)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ExpertlyError("E208", name, "is not UTF-8", fix="write it anew") from error


def write_on(
    model: "Model",
    tokenizer: "Tokenizer",
    ids: list[int],
    sampling: "Sampling",
    ends: frozenset[int] = frozenset(),
) -> tuple["Iterable[str]", "Pace"]:
    """The text behind some tokens as it comes, and how fast it does. ends: as in stream_ids."""
    from functools import partial

    from expertly.engine.generate import Pace, stream_ids
    from expertly.engine.text import pieces
    from expertly.models.tokenizer import decode

    pace = Pace(stream_ids(model, ids, sampling, ends), len(ids))
    return pieces(partial(decode, tokenizer), pace), pace


def print_whole(said: dict[str, Any], pace: "Pace") -> None:
    """What was written, with its speed, as JSON."""
    print_json(
        {
            **said,
            "prompt_tokens": pace.prompt_tokens,
            "new_tokens": pace.new_tokens,
            "prefill_tokens_per_second": pace.prefill,
            "decode_tokens_per_second": pace.decode,
        }
    )


def _stream(prompt: str, text: "Iterable[str]", pace: "Pace") -> None:
    """The text as it comes on stdout, then its speed on stderr."""
    typer.echo(prompt, nl=False)
    try:
        for piece in text:
            typer.echo(piece, nl=False)
    finally:
        typer.echo()  # the shell's next line is its own, after Ctrl-C as well
    typer.echo(speed(pace), err=True)


def speed(pace: "Pace") -> str:
    """How fast a text came, in words."""
    said = f"prompt {pace.prompt_tokens} tokens, {pace.prefill:.1f} tokens/s"
    if pace.decode is None:
        return f"{said}; new {pace.new_tokens}"
    return f"{said}; new {pace.new_tokens} tokens, {pace.decode:.1f} tokens/s"
