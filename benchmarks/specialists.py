"""Three specialists of one small dense model become one MoE: does its router know their domains?

Run: python benchmarks/specialists.py [--dense FOLDER] [--steps 150] [--top-k 1] [key=value ..]
The dense model goes on for some steps on each domain of the standard library by itself
(Branch-Train-MiX, arXiv 2403.07816), and `expertly upcycle` merges the three by a recipe in
mergekit's words, its prompts from training documents. The tables are of held-out text:
where each domain's tokens go, and the loss of each model. Without --dense a small dense model is
trained first. Stopped, the same command goes on.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor
from upcycle_training import expertly, small_dense

from expertly.cli.options import table
from expertly.data.config import Source
from expertly.data.sample import sample_rows
from expertly.data.sources import training_sample
from expertly.folders import checkpoints
from expertly.models.loading import open_model
from expertly.models.tokenizer import encode_batch, open_tokenizer
from expertly.watch.audit import Text, look

CONFIG = Path(__file__).with_name("upcycle_training.yaml")
DOMAINS = {"code": "stdlib:code", "docs": "stdlib:docs", "tables": "stdlib:tables"}
_PROMPTS, _CHARACTERS = 24, 1200  # of each domain, and of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/specialists"))
    parser.add_argument("--dense", type=Path, help="a dense model's folder")
    parser.add_argument("--steps", type=int, default=150, help="of each specialist")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    dense = asked.dense or small_dense(asked.folder / "dense", 600)
    models = {"dense": dense}
    for name in DOMAINS:
        models[name] = specialist(name, dense, asked)
    merged = asked.folder / f"merged-top-{asked.top_k}"
    if not merged.exists():
        file = recipe(models, asked.folder)
        expertly("upcycle", file, merged, "--top-k", asked.top_k)
    print(as_text({**models, "merged": merged}))


def specialist(name: str, dense: Path, asked: argparse.Namespace) -> Path:
    """The dense model after some steps on one domain."""
    run = asked.folder / name
    orders = [
        f"model.path={dense}",
        f"data.sources=[{{path: '{DOMAINS[name]}'}}]",
        f"schedule.max_steps={asked.steps}",
        f"output_dir={run}",
        *asked.overrides,
    ]
    expertly("train", CONFIG, *orders, "--resume")
    return checkpoints(run)[-1]


def recipe(models: dict[str, Path], folder: Path) -> Path:
    """The merge as a file that mergekit-moe reads, too."""
    experts = [
        {"source_model": str(models[name].resolve()), "positive_prompts": prompts(path)}
        for name, path in DOMAINS.items()
    ]
    said = {"base_model": str(models["dense"].resolve()), "gate_mode": "hidden", "experts": experts}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(said, sort_keys=False))
    return file


def prompts(path: str) -> list[str]:
    """The beginnings of some training documents."""
    found = training_sample([Source(path=path)], 2**20, 0.05)
    return [text[:_CHARACTERS] for text in found[:: max(1, len(found) // _PROMPTS)]][:_PROMPTS]


def as_text(models: dict[str, Path]) -> str:
    """Two tables: each domain's way through the merged model, and everybody's losses."""
    rows = held_out(models["merged"])
    merged = open_model(models["merged"])
    texts = {name: Text(ids) for name, ids in rows.items()}
    counts = look(merged, texts, lambda line: print(line, file=sys.stderr)).counts
    shares = {name: each.load / each.load.sum(dim=1, keepdim=True) for name, each in counts.items()}
    layers = len(next(iter(shares.values())))
    head = ["tokens of", *[f"layer {i}" for i in range(layers)], "own expert first in"]
    way = [head]
    for index, (name, share) in enumerate(shares.items()):
        first = int((share.argmax(dim=1) == index).sum())
        own = [f"{value:.0%}" for value in share[:, index].tolist()]
        way.append([name, *own, f"{first} of {layers} layers"])
    losses = [["held-out loss", *rows]]
    for name, folder in models.items():
        model = merged if name == "merged" else open_model(folder)
        losses.append([name, *[f"{loss(model, ids):.3f}" for ids in rows.values()]])
    return "\n\n".join(
        ["share of a domain's tokens that its own expert gets", table(way), table(losses)]
    )


def held_out(folder: Path) -> dict[str, Tensor]:
    """Some tokens of every domain's held-out documents, (rows, seq)."""
    tokenizer = open_tokenizer(folder)
    return sample_rows(
        [Source(path=path) for path in DOMAINS.values()],
        lambda texts: encode_batch(tokenizer, texts),
        tokenizer.eos_token_id,
        tokens=8192,
        sequence_length=256,
        held_out=True,
    )


@torch.no_grad()
def loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Nats per token."""
    totals = [float(model(rows, labels=rows).loss) * len(rows) for rows in ids.split(8)]
    return sum(totals) / len(ids)


if __name__ == "__main__":
    main()
