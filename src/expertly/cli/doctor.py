"""expertly doctor: what this machine has, and what is slow here and why."""

from dataclasses import asdict

import typer

from expertly.cli.options import Json, print_json


def doctor(json: Json = False) -> None:
    """Show versions, device and threads, measure this machine, and say what is slow and why.

    Example: expertly doctor --json
    """
    from expertly.bench.doctor import examine

    found = examine()
    if json:
        print_json(asdict(found))
        return
    for name, version in found.versions.items():
        typer.echo(f"{name:14}{version}")
    typer.echo(f"{'device':14}{found.device}")
    typer.echo(f"{'threads':14}{found.threads} of {found.cores} cores")
    for name, speed in found.speeds.items():
        typer.echo(f"{name:14}{speed:,.0f} GFLOP/s")
    typer.echo(f"{'kernels':14}{found.kernels}")
    typer.echo(f"{'4-bit product':14}{found.packed_speed:,.0f} GOP/s")
    if found.read_speed:
        typer.echo(f"{'memory, read':14}{found.read_speed:,.1f} GB/s")
    for finding in found.findings:
        typer.echo(f"! {finding}")
    if not found.findings:
        typer.echo("nothing is slow for a reason that you can change")
