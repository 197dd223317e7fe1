"""expertly inspect: what is in a model folder."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertly.cli.options import Json, number, print_json, table

if TYPE_CHECKING:
    from expertly.models.inspect import Inspection


def inspect(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder.", show_default=False)
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Check every file's sha256.")] = False,
    json: Json = False,
) -> None:
    """Show a model's family, layers, experts, layout, dtype, bytes by part and parameters.

    Example: expertly inspect runs/demo/moe/checkpoint-300 --verify
    """
    from expertly.models.inspect import inspect_folder

    found = inspect_folder(folder, hashes=verify)
    if json:
        print_json(asdict(found))
    else:
        typer.echo(_page(found, verify))


def _page(found: "Inspection", verify: bool) -> str:
    lines = [f"family   {found.family}", f"layers   {found.layers}"]
    if found.experts:
        experts = f"{found.experts} in each of {found.moe_layers} layers, top {found.top_k}"
        lines += [f"experts  {experts}", f"layout   {found.layout}"]
    lines += [f"format   {found.format}", f"dtype    {', '.join(found.dtypes)}"]
    checked = "sha256 checked" if verify else "sizes agree with its manifest"
    lines.append(f"files    {checked if found.verified else 'no manifest: contents unverified'}")
    rows = [["part", "parameters", "MiB"]]
    rows += [
        [part, number(count), f"{found.bytes[part] / 2**20:,.1f}"]
        for part, count in found.parameters.items()
    ]
    rows.append(["total", number(found.total), f"{sum(found.bytes.values()) / 2**20:,.1f}"])
    rows.append(["active per token", number(found.active), ""])
    return "\n".join([*lines, "", table(rows)])
