"""One walk, as a user takes it: from text files through the command line to text."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """\
model:
  family: qwen3_moe
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  num_experts: 4
  num_experts_per_tok: 2
  moe_intermediate_size: 32
  extra: {head_dim: 8}
data:
  sources: [{path: texts}]
  eval_fraction: 0.2
  sequence_length: 32
  vocab_size: 300
  eval_tokens: 1000
  cache_dir: cache
optim: {learning_rate: 1e-2}
schedule: {max_steps: 20, per_device_train_batch_size: 8}
eval: {eval_steps: 5}
log: {save_steps: 10}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    (folder / "texts").mkdir()
    draw = random.Random(0)
    words = ["the", "a", "red", "green", "cat", "dog", "sees", "hears", "and", "tree"]
    for number in range(30):
        text = " ".join(draw.choice(words) for _ in range(200))
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def expertly(here: Path, *arguments: str) -> str:
    """What the command line says on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "expertly", *arguments],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_text_to_text(here, cli, monkeypatch):
    moe = json.loads(expertly(here, "train", "run.yaml", "output_dir=moe", "--json"))
    monkeypatch.chdir(here)  # for those in this process: how one starts has been seen
    assert cli("train", "run.yaml", "output_dir=twin", "model.twin=true")[0] == 0

    assert moe["steps"] == 20
    assert Path(moe["checkpoint"]) == Path("moe/checkpoint-20")
    lines = (here / "moe" / "metrics.jsonl").read_text().splitlines()
    losses = [record["eval"]["loss"] for record in map(json.loads, lines) if "eval" in record]
    assert len(losses) == 5
    assert losses[-1] == moe["loss"] < losses[0] - 1
    receipt = json.loads((here / "moe" / "receipt.json").read_text())
    assert receipt["verdict"] == "pass"
    policy = receipt["changed"].pop("policy")
    assert (policy["router"], policy["top_k"], policy["stock"]) == ("softmax_topk", 2, True)
    assert receipt["changed"] == {"experts": "8 of 8", "routers": "2 of 2"}

    raced = json.loads(expertly(here, "compare", "moe", "twin", "--json"))
    assert raced["a"]["losses"] == losses
    assert (
        raced["a"]["tokens"] == raced["b"]["tokens"] == [at * 8 * 32 for at in (0, 5, 10, 15, 20)]
    )
    assert any(race["a"] and race["b"] for race in raced["races"])

    found = json.loads(expertly(here, "inspect", moe["checkpoint"], "--verify", "--json"))
    assert (found["experts"], found["moe_layers"], found["top_k"]) == (4, 2, 2)
    assert found["verified"]
    assert found["active"] < found["total"] == receipt["figures"]["parameters"]

    asked = ["--prompt", "the red", "--max-new-tokens", "12", "--json"]
    text = json.loads(expertly(here, "generate", moe["checkpoint"], *asked))["text"]
    assert len(text) > 5

    code, _, refused = cli("train", "run.yaml", "output_dir=moe")
    assert code == 2 and refused.startswith("expertly: error[E205]")
    assert refused.count("\n") == 1
