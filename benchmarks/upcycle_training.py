"""Does an upcycled model, trained on, get further than the dense model trained as long?

Run: python benchmarks/upcycle_training.py [key=value ..] [--dense FOLDER] [--arms dense ..]
All arms read the same rows and evaluate on the same held-out text. Slices with top-4 of 16 and
copies with top-1 use as many parameters a token as the dense model; copies with top-2 use more;
straight: with DenseMixer's router gradients; slow: with routers that move a hundredth as fast, so
that slices stay together for a while. Without --dense a small dense model is trained first.
Two arms run side by side, each on half of the cores. Stopped, the same command goes on.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from expertly.cli.options import number, print_json, table
from expertly.folders import checkpoints
from expertly.models.inspect import inspect_folder
from expertly.train.compare import Curve, chart, reached, read_curve
from expertly.watch.records import METRICS, read_records

CONFIG = Path(__file__).with_suffix(".yaml")
_SLICES = ["--experts", "16", "--slices", "4", "--top-k", "4"]
_ALL = ["router.straight_through=true"]
_SLOW = ["optim.router_learning_rate=1e-5"]
# name -> how it is upcycled, if at all, and what its training is told besides
ARMS: dict[str, tuple[list[str], list[str]]] = {
    "dense": ([], []),
    "slices top-4": (_SLICES, []),
    "copies top-1": (["--experts", "8", "--top-k", "1"], []),
    "copies top-2": (["--experts", "8", "--top-k", "2"], []),
    "slices slow": (_SLICES, _SLOW),
    "slices straight": (_SLICES, _ALL),
    "copies clusters": (["--experts", "8", "--top-k", "1", "--router", "clusters"], []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/upcycle_training"))
    parser.add_argument("--dense", type=Path, help="a dense model's folder")
    parser.add_argument("--dense-steps", type=int, default=600, help="of the small one, without")
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:6], choices=ARMS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    dense = asked.dense or small_dense(asked.folder / "dense", asked.dense_steps)
    with ThreadPoolExecutor(max_workers=2) as side_by_side:
        jobs = [
            side_by_side.submit(arm, name, dense, asked.folder, asked.overrides)
            for name in asked.arms
        ]
        runs = dict(zip(asked.arms, [job.result() for job in jobs], strict=True))
    if asked.json:
        print_json({name: facts(run) for name, run in runs.items()})
    else:
        print(as_text(runs))


def small_dense(folder: Path, steps: int) -> Path:
    """The dense twin of what `expertly demo` trains, trained from scratch."""
    config = Path(__file__).parents[1] / "src/expertly/cli/demo.yaml"
    orders = ["model.twin=true", f"schedule.max_steps={steps}", f"output_dir={folder}"]
    expertly("train", config, *orders, "--resume")
    return checkpoints(folder)[-1]


def arm(name: str, dense: Path, folder: Path, overrides: list[str]) -> Path:
    """Upcycle as an arm says, and train on; what is finished is only read. Returns its run."""
    how, told = ARMS[name]
    stem = name.replace(" ", "-")
    model, run = dense, folder / "runs" / stem
    if how:
        model = folder / "models" / stem
        if not model.exists():
            expertly("upcycle", dense, model, *how)
    orders = [f"model.path={model}", f"output_dir={run}", *told, *overrides]
    expertly("train", CONFIG, *orders, "--resume")
    return run


def expertly(*arguments: object) -> None:
    """Run a verb to its end, on half of the cores."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    command = [sys.executable, "-m", "expertly", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=sys.stderr, env=env)


def facts(run: Path) -> dict[str, Any]:
    """A run's curve, its sizes, and the state of its routers and experts at the end."""
    records = read_records(run / METRICS)
    seen = inspect_folder(checkpoints(run)[-1])
    return {
        "curve": read_curve(run)._asdict(),
        "parameters": seen.total,
        "active_parameters": seen.active,
        "router": next((r["moe"] for r in reversed(records) if "moe" in r), None),
        "divergence": [r["divergence"] for r in records if "divergence" in r],
    }


def as_text(runs: dict[str, Path]) -> str:
    """A row for each arm, the routers' health, the curves."""
    found = {name: facts(run) for name, run in runs.items()}
    curves = {name: Curve(**each["curve"])._replace(name=name) for name, each in found.items()}
    head = ["arm", "parameters", "active", "loss", "fewer steps", "less time", "tok/s"]
    rows = [[*head, *next(iter(curves.values())).domains]]
    for name, each in found.items():
        sizes = [number(each["parameters"]), number(each["active_parameters"])]
        curve = curves[name]
        domains = [f"{loss:.3f}" for loss in curve.domains.values()]
        lead = ahead(curve, curves["dense"]) if "dense" in curves else ["-", "-"]
        speed = f"{curve.tokens_per_second:,.0f}"
        rows.append([name, *sizes, f"{curve.losses[-1]:.4f}", *lead, speed, *domains])
    health = [["arm", "load max", "dead", "entropy", "to the dense", "to each other"]]
    health += [state(name, each) for name, each in found.items() if each["router"]]
    return "\n\n".join([table(rows), table(health), chart(list(curves.values())[:4])])


def ahead(curve: Curve, dense: Curve) -> list[str]:
    """The dense run's steps and seconds to its last loss, over those of a curve to the same."""
    goal = reached(curve, dense.losses[-1])
    if goal is None:
        return ["-", "-"]
    ratios = (dense.steps[-1] / goal.step, dense.seconds[-1] / goal.seconds)
    return [f"{ratio:.2f}x" for ratio in ratios]


def state(name: str, found: dict[str, Any]) -> list[str]:
    """A router's last watch set, and the cosines of its experts."""
    router, last = found["router"], (found["divergence"] or [{}])[-1]
    cosines = [last.get(key) for key in ("to_dense", "to_each_other")]
    told = ["-" if value is None else f"{value:.3f}" for value in cosines]
    loads = [f"{router['max_load_ratio']:.2f}x", f"{router['dead_frac']:.1%}"]
    return [name, *loads, f"{router['entropy_norm']:.3f}", *told]


if __name__ == "__main__":
    main()
