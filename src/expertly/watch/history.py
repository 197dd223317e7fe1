"""A run's router history as one report: from what a run wrote down, without opening its model.

It reads metrics.jsonl, router.jsonl and the newest checkpoint's config.json. The dict it builds
is printed by `expertly watch --json` and drawn by page.py; it judges nothing and writes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median_high
from typing import Any

from expertly.errors import ExpertlyError
from expertly.families import family_of, moe_layer_indices, sizes
from expertly.folders import checkpoints, read_json
from expertly.watch.checks import check_metrics, check_router
from expertly.watch.records import METRICS, ROUTER, finite, read_records

# cells of load in a report: at six characters each its page stays below 2 MB
MOST_CELLS = 250_000

_COSINES = ("to_dense", "to_each_other")

Record = Mapping[str, Any]
Rows = Sequence[Sequence[float]]


def history(run: Path) -> dict[str, Any]:
    """The report of a run folder, kind "run"; load is over an even share: 1 is even.

    Raises E305 when the folder holds no run, E303 when the run recorded no router, E301 for a
    damaged line.
    """
    metrics, snapshots, domains, alike = _read(run)
    return report(run.resolve().name, "run", _config(run), metrics, snapshots, domains, alike)


def report(
    title: str,
    kind: str,
    config: Record,
    metrics: Sequence[Record],
    snapshots: Sequence[Record],
    domains: Record,
    alike: Sequence[Record] = (),
) -> dict[str, Any]:
    """The report of records as a run writes them, wherever they are from.

    kind: "run" or "model". config: the model's; empty when it is not known. domains: the loads of
    each domain, shares per layer; may be empty. alike: the records with a divergence.
    """
    last = snapshots[-1]
    layers, experts = len(last["load"]), len(last["load"][0])
    alarms = _alarms(metrics)
    domain_cells = len(domains) * layers * experts
    kept = _thin(snapshots, (MOST_CELLS - domain_cells) // (layers * experts))
    steps = [record["step"] for record in kept]
    measured = [record["norms"] for record in snapshots if "norms" in record]
    return {
        "title": title,
        "kind": kind,
        **_model(config, metrics, layers),
        "layers": layers,
        "experts": experts,
        "tokens": last["tokens"],
        "steps": steps,
        "load": [over_even(record["load"]) for record in kept],
        "series": _series(kept) | _cosines(alike, steps),
        "norms": _over_median(measured[-1]) if measured else None,
        "domains": _domains(domains),
        "drift": None,
        "alarms": alarms,
        "worst": _worst(alarms, last["load"]),
        "summary": _summary(metrics),
    }


def specialisation(loads: Rows) -> float:
    """How differently domains use the experts: (domains, experts) shares of 1 -> 0 to 1.

    The Jensen-Shannon divergence of the domains, equally weighted, over its most, log(domains).
    A domain without a token is left out.
    """
    loads = [load for load in loads if any(load)]
    if len(loads) < 2:
        return 0.0
    mixture = [sum(column) / len(loads) for column in zip(*loads, strict=True)]
    inside = sum(_entropy(load) for load in loads) / len(loads)
    return max(0.0, min(1.0, (_entropy(mixture) - inside) / math.log(len(loads))))


def over_even(rows: Rows) -> list[list[float]]:
    """Shares of 1 as loads over an even share, 3 decimals: 0 is no token and nothing else."""
    return [[_load(share * len(row)) for share in row] for row in rows]


def _config(run: Path) -> Record:
    """The config of a run's model, of the base beside which adapters learn; empty when unknown."""
    saved = checkpoints(run)
    whole = [folder for folder in saved if (folder / "config.json").is_file()]
    if saved and not whole:
        from expertly.models.adapter_files import base_of  # costs seconds: for adapters alone

        with suppress(ExpertlyError):  # a base may have gone
            whole = [base_of(saved[-1])]
    return read_json(whole[-1] / "config.json") if whole else {}


def _load(ratio: float) -> float:
    return max(round(ratio, 3), 0.001) if ratio > 0 else 0.0


def _read(run: Path) -> tuple[list[Record], list[Record], Record, list[Record]]:
    """metrics.jsonl, records with a load, the last domains, and records with a divergence."""
    if not (run / METRICS).is_file() and not (run / ROUTER).is_file():
        why = f"holds no {METRICS}, so it is not a run"
        raise ExpertlyError("E305", str(run), why, fix="name the output_dir of expertly train")
    metrics, router = read_records(run / METRICS), read_records(run / ROUTER)
    check_metrics(run / METRICS, metrics)
    check_router(run / ROUTER, router)
    snapshots: list[Record] = [record for record in router if "load" in record]
    if not snapshots:
        why = "has no record yet: a dense model, or a run before its first report"
        fix = "name a run of an MoE model, or wait for logging_steps steps"
        raise ExpertlyError("E303", str(run / ROUTER), why, fix=fix)
    domains = [record["domains"] for record in router if "domains" in record]
    alike: list[Record] = [record for record in router if "divergence" in record]
    return [*metrics], snapshots, (domains or [{}])[-1], alike


def _model(config: Record, metrics: Sequence[Record], layers: int) -> dict[str, Any]:
    """Family, top_k and the layers' names, from the model's config; else from the records."""
    indices = moe_layer_indices(config) if family_of(config) else []
    if len(indices) != layers:
        names = [f"layer {layer}" for layer in range(layers)]
        return {"family": "unknown", "top_k": _top_k(metrics), "names": names}
    # all that a run writes counts its MoE layers from 0; say where they are if that differs
    names = [
        f"layer {layer}" + (f" (block {block})" if block != layer else "")
        for layer, block in enumerate(indices)
    ]
    return {"family": config["model_type"], "top_k": sizes(config).top_k, "names": names}


def _top_k(metrics: Sequence[Record]) -> int:
    """What the last balance loss says of it; 0 when nothing does."""
    for record in reversed(metrics):
        aux_loss, per_k = (
            record.get("moe", {}).get(name) for name in ("aux_loss", "aux_loss_per_k")
        )
        if aux_loss and per_k and math.isfinite(aux_loss / per_k):
            return round(aux_loss / per_k)
    return 0


def _thin(records: Sequence[Record], most: int) -> list[Record]:
    """At most that many records, evenly chosen, the first and the last among them."""
    most = max(2, most)
    if len(records) <= most:
        return list(records)
    gap = (len(records) - 1) / (most - 1)
    return [records[round(gap * index)] for index in range(most)]


def _series(records: Sequence[Record]) -> dict[str, Any]:
    """Per name (steps, layers): from the load, which every run has, and what newer runs add."""
    series: dict[str, Any] = {
        "entropy_norm": [_entropies(record["load"]) for record in records],
        "max_load_ratio": [
            [round(max(load) * len(load), 4) for load in record["load"]] for record in records
        ],
    }
    if "mass" in records[-1]:
        series["mass_entropy_norm"] = [
            _entropies(record["mass"]) if "mass" in record else None for record in records
        ]
    for name in ("router_confidence", "dropped_frac"):
        if name in records[-1].get("layers", {}):
            rows = [record.get("layers", {}).get(name) for record in records]
            series[name] = finite(rows)
    return series


def _cosines(records: Sequence[Record], steps: Sequence[int]) -> dict[str, Any]:
    """Per name (steps, layers), what the latest evaluation until each step said; None before.

    Of names that the latest of all has.
    """
    series: dict[str, Any] = {}
    for name in records[-1]["divergence"] if records else ():
        if name in _COSINES:
            rows = [(record["step"], record["divergence"].get(name)) for record in records]
            until = [[row for at, row in rows if at <= step] for step in steps]
            series[f"cosine_{name}"] = [known[-1] if known else None for known in until]
    return series


def _entropies(rows: Rows) -> list[float]:
    """Entropy of each row of shares over that of an even one; a single expert is even."""
    return [round(_entropy(row) / math.log(len(row)), 4) if len(row) > 1 else 1.0 for row in rows]


def _entropy(shares: Sequence[float]) -> float:
    known = [share for share in shares if share]  # a gate mass that was not a number is None
    total = sum(known)  # not quite 1: shares are rounded on disk
    return -sum(share / total * math.log(share / total) for share in known)


def _over_median(rows: Rows) -> list[list[float | None]]:
    """Each norm over the median of its layer's speaking experts: 1 is ordinary, 0 silent."""
    ordinary = [median_high([norm for norm in row if norm and norm > 0] or [1.0]) for row in rows]
    return [
        [finite(round(norm / middle, 4) if norm else norm) for norm in row]
        for row, middle in zip(rows, ordinary, strict=True)
    ]


def _domains(domains: Record) -> dict[str, Any] | None:
    if not domains:
        return None
    return {
        "names": list(domains),
        "load": [over_even(rows) for rows in domains.values()],
        "specialisation": [
            round(specialisation(rows), 4) for rows in zip(*domains.values(), strict=True)
        ],
    }


def _alarms(metrics: Sequence[Record]) -> list[dict[str, Any]]:
    """Every alarm in order, with the step at which it ended, or None while it is open."""
    alarms: list[dict[str, Any]] = []
    for record in metrics:
        for alarm in alarms:
            if alarm["cleared"] is None and _ends(record, alarm):
                alarm["cleared"] = record["step"]
        if "alarm" in record:
            said = finite(record["alarm"])
            alarms.append({"step": record["step"], **said, "cleared": None})
    return alarms


def _ends(record: Record, alarm: Record) -> bool:
    """Whether a record ends an alarm."""
    ended = record.get("cleared", {})
    return (ended.get("kind"), ended.get("layer")) == (alarm["kind"], alarm["layer"])


def _worst(alarms: Sequence[Record], load: Rows) -> list[int]:
    """Layer indices: those with an open alarm first, then the least even first."""
    alarmed = {alarm["layer"] for alarm in alarms if alarm["cleared"] is None}
    evenness = _entropies(load)
    return sorted(range(len(load)), key=lambda layer: (layer not in alarmed, evenness[layer]))


def _summary(metrics: Sequence[Record]) -> dict[str, Any]:
    """The last watch set, and how alike experts were in the last evaluation.

    A number that is not finite becomes None, which JSON can say.
    """
    watched = [record["moe"] for record in metrics if "moe" in record]
    alike = [record["divergence"] for record in metrics if "divergence" in record]
    last = {f"cosine_{name}": value for name, value in (alike or [{}])[-1].items()}
    return finite({**(watched or [{}])[-1], **last})
