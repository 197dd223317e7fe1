"""expertly generate: write text with a model folder."""

from pathlib import Path
from typing import Annotated

import typer

from expertly.cli.options import Json, print_json


def generate(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How much to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    json: Json = False,
) -> None:
    """Continue a prompt.

    Example: expertly generate runs/demo/moe/checkpoint-300 --prompt "def main("
    """
    import torch

    from expertly.engine.generate import Sampling, generate_ids
    from expertly.models.loading import open_model
    from expertly.models.tokenizer import decode, encode_prompt, open_tokenizer

    model = open_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = open_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    answer = decode(tokenizer, generate_ids(model, ids, sampling))
    if json:
        print_json({"prompt": prompt, "text": answer, "prompt_tokens": len(ids)})
    else:
        typer.echo(prompt + answer)
