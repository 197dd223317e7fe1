"""The verbs. Nothing heavy is imported before a verb runs, so help comes at once."""

from typing import Annotated

import typer

from expertly import __version__
from expertly.cli.compare import compare
from expertly.cli.demo import demo
from expertly.cli.doctor import doctor
from expertly.cli.finetune import finetune
from expertly.cli.generate import generate
from expertly.cli.inspect import inspect
from expertly.cli.merge import merge
from expertly.cli.plan import plan
from expertly.cli.train import train
from expertly.cli.upcycle import upcycle
from expertly.cli.watch import watch

app = typer.Typer(
    name="expertly",
    help="The Mixture-of-Experts toolkit for the Hugging Face stack.",
    epilog="Start with: expertly demo. Errors show their traceback with --debug.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    demo,
    plan,
    train,
    upcycle,
    finetune,
    merge,
    watch,
    compare,
    generate,
    inspect,
    doctor,
):
    app.command()(verb)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The Mixture-of-Experts toolkit for the Hugging Face stack."""
