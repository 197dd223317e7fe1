"""expertly watch: are the experts alive? A table, and a page to look at."""

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from expertly.cli.options import Json, print_json, table
from expertly.errors import ExpertlyError

_ROWS = 12  # layers in the table at most, the worst ones; the page has all


def watch(
    target: Annotated[
        Path, typer.Argument(help="A run's folder, or a model's.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text for a model to read: a file, folder or stdlib; may be repeated."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A model folder: how far has the router drifted from it?")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="To read, of each domain.")] = 8192,
    output: Annotated[
        Path | None,
        typer.Option(help="The page.", show_default="watch-NAME.html; none with --json"),
    ] = None,
    json: Json = False,
) -> None:
    """Show how a router spreads its tokens, what is wrong and what to do about it.

    A run is read from what it wrote down; a model, wherever it was trained, reads some text
    (stdlib unless --data says otherwise). With --data or --reference a run's newest checkpoint
    does. Example: expertly watch runs/demo/moe
    """
    from expertly.folders import save_file
    from expertly.watch.history import history
    from expertly.watch.page import page
    from expertly.watch.records import METRICS

    is_run = (target / METRICS).is_file()
    if is_run and not (data or reference):
        report = history(target)
    else:
        folder = _newest(target, data, reference) if is_run else target
        report = _audit(folder, data or ["stdlib"], reference, tokens)
    if json:
        print_json(report)
    else:
        typer.echo(_text(report))
        output = output or Path(f"watch-{target.resolve().name}.html")
    if output is not None:
        save_file(output, page(report))
    if not json:
        typer.echo(f"\npage          {output}")


def _newest(run: Path, data: list[str] | None, reference: Path | None) -> Path:
    """A run's newest checkpoint; E305 before the first."""
    from expertly.folders import checkpoints

    saved = checkpoints(run)
    if not saved:
        asked = [name for name, given in (("--data", data), ("--reference", reference)) if given]
        fix = f"leave {' and '.join(asked)} out"
        raise ExpertlyError("E305", str(run), "has no checkpoint yet", fix=fix)
    return saved[-1]


def _audit(folder: Path, data: list[str], reference: Path | None, tokens: int) -> dict[str, Any]:
    """The report of a model folder, and how it differs from another on the same text."""
    from functools import partial

    from expertly.data.config import Source
    from expertly.data.sample import sample_rows
    from expertly.models.adapter_files import base_of
    from expertly.models.configs import read_config
    from expertly.models.loading import open_model
    from expertly.models.packed_loading import choose_device
    from expertly.models.tokenizer import encode_batch, open_tokenizer
    from expertly.watch.audit import Text, audit, look
    from expertly.watch.drift import drift_report
    from expertly.watch.records import finite

    def say(line: str) -> None:
        typer.echo(line, err=True)

    config, tokenizer = read_config(base_of(folder)), open_tokenizer(folder)
    longest = config.get("max_position_embeddings") or 512  # null is allowed
    rows = sample_rows(
        [Source(path=path) for path in data],
        lambda texts: encode_batch(tokenizer, texts),
        tokenizer.eos_token_id,
        tokens=tokens,
        sequence_length=min(512, longest),
    )
    for each in filter(None, (folder, reference)):
        _check_vocabulary(base_of(each), max(int(ids.max()) for ids in rows.values()))
    texts = {domain: Text(ids) for domain, ids in rows.items()}
    opens = [
        partial(open_model, each, device=choose_device(base_of(each)))
        for each in (folder, reference)
        if each is not None
    ]
    resolved = folder.resolve()
    title = f"{resolved.parent.name}/{resolved.name}"
    if reference is None:
        return finite(audit(title, config, look(opens[0](), texts, say)))
    return drift_report(title, config, texts, (opens[0], opens[1]), reference.name, say)


def _check_vocabulary(folder: Path, highest: int) -> None:
    """Raises E305 for a model that does not know every token that it is to read."""
    from expertly.models.loading import open_config

    known = open_config(folder).vocab_size
    if known <= highest:
        why = f"has a vocabulary of {known:,} tokens, the tokenizer made token {highest:,}"
        fix = "name models with one tokenizer, the one they were trained with"
        raise ExpertlyError("E305", str(folder), why, fix=fix)


def _text(report: dict[str, Any]) -> str:
    """The report for a terminal: numbers, drift, the worst layers, what to do about each alarm."""
    from expertly.watch.report import readings, spread

    rows = [["router", "now", "healthy"], *map(list, readings(report["summary"]))]
    worst, last = report["worst"][:_ROWS], report["load"][-1]
    width = max(len(report["names"][layer]) for layer in worst)
    bars = [
        f"{report['names'][layer].ljust(width)}  {spread(last[layer], even=1)}" for layer in worst
    ]
    drift = [drift_table(report["drift"]), ""] if report["drift"] else []
    title = "load of each expert, the worst layer first (half height is an even share)"
    open_alarms = [alarm for alarm in report["alarms"] if alarm["cleared"] is None]
    lines = [f"alarm: {alarm['what']}\n       {alarm['advice']}" for alarm in open_alarms]
    return "\n".join([table(rows), "", *drift, title, *bars, "", *(lines or ["no alarm is open"])])


def drift_table(drift: dict[str, Any]) -> str:
    """Domain by domain, the reference's figure and the model's."""
    head = [
        f"from {drift['reference']}",
        "loss",
        "change",
        "same experts",
        "load moved",
        "confidence",
    ]
    return table([head, *(_drifted(name, of) for name, of in drift["domains"].items())])


def _drifted(name: str, of: dict[str, Any]) -> list[str]:
    before, now = of["loss"]
    known = before is not None and now is not None
    loss = [f"{before:.3f} \u2192 {now:.3f}", f"{now - before:+.3f}"] if known else ["-", "-"]
    alike, moved = fmean(of["overlap"]), fmean(of["divergence"])
    first, second = of["confidence"]
    return [name, *loss, f"{alike:.1%}", f"{moved:.4f}", f"{first:.3f} \u2192 {second:.3f}"]
