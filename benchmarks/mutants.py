"""What do loaders make of damaged model folders? The same mutants, ours and stock transformers.

Run: python benchmarks/mutants.py [--count 10000] [--seconds 2]
Half of the table is mutants of weights in a folder with a manifest, half mutants of config.json in
a folder without. tests/faults/trials.py defines "right" and "WRONG"; a hang is longer than
--seconds, a crash is a worker that died. Each loader meets every mutant in forked workers.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from expertly.folders import MANIFEST, save_folder
from expertly.models.build import build_model, model_config
from expertly.models.loading import open_model, save_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
import mutants
import trials

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
}
COLUMNS = ("one line", "other errors", "right", "WRONG", "hang", "crash")
# Stock loaders read safetensors alone, or they would run the pickles that some mutants name.
STOCK = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=False, use_safetensors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        columns = (f"{name:>12}" for name in COLUMNS)
        print(f"{'mutants of':10}  {'loader':24}", *columns, "  seconds")
        weights(root, asked)
        configs(root, asked)


def saved(folder: Path, seed: int, shards: bool) -> Path:
    """A tiny Mixtral with a manifest."""
    torch.manual_seed(seed)
    model = build_model(model_config("mixtral", SIZES))
    if shards:
        return save_folder(folder, lambda to: model.save_pretrained(to, max_shard_size="60KB"))
    return save_folder(folder, lambda to: save_model(model, to))


def weights(root: Path, asked: argparse.Namespace) -> None:
    """Weights in shards: hashed, sizes alone, stock."""
    one, two = saved(root / "one", 0, True), saved(root / "two", 1, True)
    right = partial(trials.same_bits, original=open_model(one).state_dict())
    folder = shutil.copytree(one, root / "weights")
    loaders = {
        "expertly, verify=True": partial(open_model, verify=True),
        "expertly, sizes alone": open_model,
        "transformers": STOCK,
    }
    for name, load in loaders.items():
        trial = trials.Trial(partial(mutants.weight_mutant, one, two), load, right)
        told("weights", name, trial, folder, asked)


def configs(root: Path, asked: argparse.Namespace) -> None:
    """config.json, in a folder that no hash protects."""
    folder = saved(root / "configs", 0, False)
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    right = partial(trials.same_model, original=open_model(folder).state_dict())
    loaders: dict[str, Callable[..., Any]] = {"expertly": open_model, "transformers": STOCK}
    for name, load in loaders.items():
        trial = trials.Trial(partial(mutants.config_mutant, config), load, right)
        told("configs", name, trial, folder, asked)


def told(
    what: str, name: str, trial: trials.Trial, folder: Path, asked: argparse.Namespace
) -> None:
    """Run all mutants through one loader and print its line."""
    started = time.perf_counter()
    outcomes = trials.try_all(trial, folder, range(asked.count), asked.seconds)
    found = Counter(outcomes)
    errors = Counter({k.removeprefix("error: "): n for k, n in found.items() if k[:6] == "error:"})
    found["other errors"] = errors.total()
    cells = [f"{found[column]:>12,}" for column in COLUMNS]
    print(f"{what:10}  {name:24}", *cells, f"{time.perf_counter() - started:9.0f}", flush=True)
    for column in ("other errors", "WRONG", "hang", "crash"):
        if found[column]:
            where = [n for n, said in enumerate(outcomes) if said.startswith(column[:4])]
            kinds = errors if column == "other errors" else kinds_of(trial, where)
            print(f"{'':10}  {column}:", *(f"{kind} {n:,};" for kind, n in kinds.most_common(12)))


def kinds_of(trial: trials.Trial, numbers: list[int]) -> Counter[str]:
    """What had been done to some mutants."""
    return Counter(trial.mutant(number).kind for number in numbers)


if __name__ == "__main__":
    main()
