"""How much memory does opening a model with packed weights take, at its peak?

Run: python benchmarks/open_memory.py [--config CONFIG.json] [--layers N] [--bits 4 8 16]
Random weights of a config.json are saved once, by a process of their own. Each way to open the
folder, and the packed folder that save_model makes of it, then has a process of its own, which
notes how far its resident memory rises above where it stood before opening (VmHWM, reset through
/proc/self/clear_refs; pages of mapped files count). packed: bytes of all tensors of the open model.
Exits with 1 when a peak is above 1.15 x packed + 1 GiB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("examples/olmoe-1.8b.json"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)  # what a process is to do
    given = parser.parse_args()
    if given.step:
        {"make": _make, "open": _open}[given.step[0]](*given.step[1:])
        return 0
    with tempfile.TemporaryDirectory() as work:
        return _compare(Path(work), given)


def _compare(work: Path, given: argparse.Namespace) -> int:
    _run("make", str(given.config), str(work / "dense"), str(given.layers or ""))
    failed = False
    print(f"{'opened':24}{'seconds':>9}{'packed GiB':>12}{'peak GiB':>10}{'limit GiB':>11}")
    for bits in given.bits:
        saved = work / f"packed{bits}"
        ways = {f"bits={bits}": ("dense", str(bits), str(saved))}
        if bits < 16:
            ways[f"packed folder, {bits} bits"] = (saved.name, "", "")
        for name, (folder, asked, save) in ways.items():
            found = json.loads(_run("open", str(work / folder), asked, save))
            limit = 1.15 * found["packed"] + GIB
            failed |= found["peak"] > limit
            sizes = found["packed"] / GIB, found["peak"] / GIB, limit / GIB
            print(f"{name:24}{found['seconds']:9.1f}" + "".join(f"{size:11.3f}" for size in sizes))
    return int(failed)


def _run(*step: str) -> str:
    command = [sys.executable, __file__, "--step", *step]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _make(config: str, folder: str, layers: str) -> None:
    import torch

    from expertly.bench.random_model import random_model

    raw = json.loads(Path(config).read_text())
    if layers:
        raw["num_hidden_layers"] = int(layers)
    random_model(raw, torch.bfloat16).save_pretrained(folder)


def _open(folder: str, bits: str, save: str) -> None:
    import torch

    from expertly.models.loading import open_model, save_model

    torch.zeros(1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    model = open_model(folder, bits=int(bits) if bits else None)
    seconds = time.perf_counter() - start
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    peak = _status("VmHWM") - before
    print(json.dumps({"seconds": seconds, "packed": sum(tensors.values()), "peak": peak}))
    if save:
        save_model(model, Path(save))


def _status(key: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    sys.exit(main())
