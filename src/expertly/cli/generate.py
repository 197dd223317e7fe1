"""expertly generate: write text with a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertly.cli.options import Json, print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expertly.engine.generate import Pace


def generate(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    bits: Annotated[
        int | None,
        typer.Option(help="Pack the weights while they load: 4, 8 or 16.", show_default=False),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 or 128.", show_default="32"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How much to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    json: Json = False,
) -> None:
    """Continue a prompt, and say how fast.

    Example: expertly generate runs/demo/moe/checkpoint-300 --bits 4 --prompt "def main("
    """
    from functools import partial

    from expertly.engine.generate import Pace, stream_ids
    from expertly.engine.sampler import Sampling
    from expertly.engine.text import pieces
    from expertly.models.loading import open_model
    from expertly.models.packed_loading import choose_device
    from expertly.models.tokenizer import decode, encode_prompt, open_tokenizer

    device = choose_device(folder, bits)
    model = open_model(folder, device=device, bits=bits, group_size=group_size)
    tokenizer = open_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    pace = Pace(stream_ids(model, ids, sampling), len(ids))
    text = pieces(partial(decode, tokenizer), pace)
    if json:
        _print_whole(prompt, "".join(text), pace)
    else:
        _stream(prompt, text, pace)


def _print_whole(prompt: str, text: str, pace: "Pace") -> None:
    print_json(
        {
            "prompt": prompt,
            "text": text,
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
    typer.echo(_speed(pace), err=True)


def _speed(pace: "Pace") -> str:
    said = f"prompt {pace.prompt_tokens} tokens, {pace.prefill:.1f} tokens/s"
    if pace.decode is None:
        return f"{said}; new {pace.new_tokens}"
    return f"{said}; new {pace.new_tokens} tokens, {pace.decode:.1f} tokens/s"
