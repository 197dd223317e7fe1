"""What a checkpoint holds: a stock model folder, and our state in expertly/."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from train_models import latent_overrides
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertly import receipts
from expertly.data.batches import eval_batches
from expertly.errors import ExpertlyError
from expertly.folders import save_folder, write_json
from expertly.models.loading import open_model
from expertly.train import loop
from expertly.train.checkpoint import read_progress, whole_checkpoint
from expertly.train.proof import Proof
from expertly.train.setup import prepare
from expertly.train.text import tokenize
from expertly.watch.stats import LayerCounts

MODELS = {
    "qwen3_moe": [],
    "mixtral": ["model.family=mixtral", "model.extra={}"],
    "olmoe": ["model.family=olmoe", "model.extra={}", "model.num_key_value_heads=4"],
    "deepseek_v3": [*latent_overrides(), "router.bias_update_rate=0.01"],
    # a router with its weight in a layer of its own; experts with biases; experts that take no list
    # of the chosen; a selection bias beside the router
    "hunyuan_v1_moe": ["model.family=hunyuan_v1_moe", "model.extra={}"],
    "gpt_oss": ["model.family=gpt_oss", "model.extra={max_position_embeddings: 4096}"],
    "llama4_text": ["model.family=llama4_text", "model.extra={interleave_moe_layer_step: 1}"],
    "minimax_m2": ["model.family=minimax_m2", "model.extra={}", "router.bias_update_rate=0.01"],
    "its twin": [*latent_overrides(), "model.twin=true"],
}


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request, tmp_path_factory, configure):
    """(config, job, result): a run of 3 steps, with the job that it ended with."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = configure(folder, *MODELS[request.param], "max_steps=3")
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        real = loop.prepare
        patch.setattr(loop, "prepare", lambda *args: jobs.append(real(*args)) or jobs[-1])
        result = loop.run(config)
    return config, jobs[0], result


def rows() -> torch.Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_plain_transformers_computes_the_same(trained):
    _, job, result = trained
    stock = AutoModelForCausalLM.from_pretrained(result.checkpoint).eval()
    ours = job.model.eval()(rows()).logits
    assert (stock(rows()).logits - ours).abs().max() < 1e-5
    assert torch.equal(open_model(result.checkpoint)(rows()).logits, ours)
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    assert tokenizer.decode(tokenizer("the red cat")["input_ids"]) == "the red cat"


def test_contents(trained):
    """House rule 2."""
    _, job, result = trained
    run = result.run
    assert {file.name for file in run.glob("[!.]*")} == {
        "config.yaml",
        "metrics.jsonl",
        "receipt.json",
        "checkpoint-3",
    } | ({"router.jsonl"} if job.attachment else set())
    top = {file.name for file in result.checkpoint.iterdir()}
    stock = {"config.json", "generation_config.json", "model.safetensors"}
    assert stock | {"tokenizer.json", "tokenizer_config.json", "MANIFEST.json", "expertly"} <= top
    state = {"optimizer.safetensors", "random.safetensors", "progress.json"}
    proof = {"proof.safetensors", "alarms.safetensors"} if job.attachment else set()
    assert {file.name for file in (result.checkpoint / "expertly").iterdir()} == state | proof
    for file in (each for each in run.rglob("[!.]*") if each.is_file()):
        assert file.suffix in {".json", ".jsonl", ".yaml", ".safetensors", ".jinja"}, "no pickle"
        if file.suffix == ".safetensors":
            load_file(file)
    listed = json.loads((result.checkpoint / "MANIFEST.json").read_text())["files"]
    found = {
        file.relative_to(result.checkpoint).as_posix()
        for file in result.checkpoint.rglob("*")
        if file.is_file()
    }
    assert set(listed) == found - {"MANIFEST.json"}
    assert read_progress(result.checkpoint).step == 3


def test_the_receipt_says_what_happened(trained):
    _, job, result = trained
    receipt = receipts.read(result.run)
    assert receipt.verdict == "pass"
    checks = {check.name: check for check in receipt.checks}
    weights = load_file(result.checkpoint / "model.safetensors")
    total = sum(weight.numel() for weight in weights.values())
    assert checks["saved parameters"].figure == checks["saved parameters"].limit == total
    experts = sum(w.numel() for name, w in weights.items() if ".experts." in name)
    assert checks["saved parameters of experts"].figure == experts
    assert (experts > 0) == (job.attachment is not None)
    assert receipt.figures["held_out_loss"] == result.loss
    assert receipt.figures["held_out_loss_by_domain"] == result.domains
    if job.attachment is None:
        assert receipt.changed == {}
        assert "experts that received no token" not in checks
    else:
        policy = receipt.changed.pop("policy")
        assert receipt.changed == {"experts": "8 of 8", "routers": "2 of 2"}
        followed = job.attachment.policy
        assert (policy["router"], policy["top_k"]) == (followed.router, 2)
        assert policy["options"] == followed.options
        assert policy["stock"] is job.stock is True
        assert "note" not in policy
        assert checks["experts that received no token"].figure == 0
        assert checks["experts that received tokens but did not change"].figure == 0


def test_the_receipt_names_its_data_and_its_machine(trained):
    config, job, result = trained
    inputs = receipts.read(result.run).inputs
    assert inputs["machine"] == {"device": "cpu", "threads": torch.get_num_threads()}
    assert inputs["held_out"]["eval_tokens"] == config.data.eval_tokens
    assert {**inputs["held_out"]["sha256"]} == {s.domain: s.held_out_digest for s in job.sets}
    assert all(len(digest) == 64 for digest in inputs["held_out"]["sha256"].values())
    assert inputs["documents"] == {each.domain: each.counts for each in job.sets}
    assert list(inputs["documents"]) == job.domains == ["words", "digits"]


def test_the_receipt_follows_its_schema(trained):
    schema = json.loads((Path(__file__).parents[2] / "docs/receipt.schema.json").read_text())
    jsonschema.validate(json.loads((trained[2].run / "receipt.json").read_text()), schema)


def test_the_receipt_says_when_stock_loaders_compute_another_function(configure, tmp_path):
    own = ["router.router=topk_softmax", "capacity_factor=2", "allow_non_stock=true"]
    result = loop.run(configure(tmp_path / "run", "max_steps=1", *own))
    assert receipts.read(result.run).changed["policy"] == {
        "router": "topk_softmax",
        "top_k": 2,
        "options": {},
        "capacity_factor": 2.0,
        "stock": False,
        "note": "stock loaders compute another function",
    }


def test_a_frozen_router_is_said_to_be(configure, tmp_path):
    result = loop.run(configure(tmp_path / "run", "max_steps=2", "router_learning_rate=0"))
    changed = receipts.read(result.run).changed
    assert (changed["experts"], changed["routers"]) == ("8 of 8", "0 of 2")


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_either_matrix_shows_that_an_expert_changed(tiny, part):
    _, attachment = tiny("qwen3_moe")
    proof = Proof(attachment)
    experts = attachment.layers[1].experts
    layers, count = len(attachment.layers), len(experts.down_proj)
    assert proof.changed()["experts"] == f"0 of {layers * count}"
    with torch.no_grad():
        getattr(experts, part)[2] *= 1.5
    assert proof.changed()["experts"] == f"1 of {layers * count}"


def test_a_router_whose_selection_bias_alone_moved_has_not_changed(tiny):
    """Ernie's is a parameter of its router."""
    _, attachment = tiny("ernie4_5_moe")
    proof = Proof(attachment)
    attachment.bias[0] += 0.5
    assert proof.changed()["routers"].startswith("0 of")
    with torch.no_grad():
        attachment.layers[0].router.weight[1] *= 1.5
    assert proof.changed()["routers"].startswith("1 of")


def test_an_expert_that_received_tokens_and_did_not_change(tiny):
    _, attachment = tiny("qwen3_moe")
    proof = Proof(attachment)
    assert proof.unmoved() == 0, "none has received a token"
    load = torch.zeros(len(attachment.layers), len(attachment.layers[0].experts.down_proj))
    load[0, 1] = load[1, 0] = 3
    proof.add(LayerCounts(*[load] * len(LayerCounts._fields)))
    assert proof.unmoved() == 2
    with torch.no_grad():
        attachment.layers[0].experts.gate_up_proj[1] += 1
    assert proof.unmoved() == 1


def test_experts_that_do_not_learn_fail_the_receipt(configure, tmp_path):
    """A rate so small that float32 weights stay where they are."""
    tiny_rate = ["learning_rate=1e-30", "router_learning_rate=1e-3", "max_steps=2"]
    why = r"E101\] experts that received tokens but did not change: failed with 8, limit 0.*optim"
    with pytest.raises(ExpertlyError, match=why):
        loop.run(configure(tmp_path / "run", *tiny_rate))


def test_the_newest_is_the_one_with_the_highest_step(tmp_path):
    assert whole_checkpoint(tmp_path, print) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11"):
        save_folder(tmp_path / name, lambda folder: write_json(folder / "a.json", {}))
    for name in ("checkpoint-x", ".checkpoint-99.host.1.tmp", "checkpoint-12.damaged"):
        (tmp_path / name).mkdir()
    assert whole_checkpoint(tmp_path, print) == tmp_path / "checkpoint-11"


def test_damaged_ones_are_said_kept_aside_and_passed_over(tmp_path):
    for name in ("checkpoint-8", "checkpoint-9", "checkpoint-10"):
        save_folder(tmp_path / name, lambda folder: write_json(folder / "a.json", {"is": 1}))
    (tmp_path / "checkpoint-10.damaged").mkdir()
    (tmp_path / "checkpoint-10" / "MANIFEST.json").unlink()
    (tmp_path / "checkpoint-9" / "a.json").write_text('{\n  "is": 2\n}\n')
    said = []
    assert whole_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-8"
    assert "its MANIFEST.json is missing. Kept as checkpoint-10.damaged1" in said[0]
    assert "sha256 mismatch. Kept as checkpoint-9.damaged" in said[1]
    assert "going on from checkpoint-8" in said[2]
    left = {path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir()}
    assert left == {"8", "9.damaged", "10.damaged", "10.damaged1"}


def test_held_out_loss_is_the_saved_models(trained):
    """What the run reports can be computed from its checkpoint by stock transformers."""
    config, job, result = trained
    sets = tokenize(config.data, job.tokenizer, lambda line: None)
    stock = AutoModelForCausalLM.from_pretrained(result.checkpoint).eval()
    total, count = 0.0, 0
    for batch in eval_batches(sets, batch_size=4, sequence_length=32, eval_tokens=500):
        labels = batch.input_ids.where(batch.attention_mask.bool(), -100)
        number = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            out = stock(batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
        total, count = total + float(out.loss) * number, count + number
    assert result.loss == pytest.approx(total / count, rel=1e-5)


def test_a_checkpoint_is_a_start_for_another_run(trained, configure, tmp_path):
    """Its own class, twin of DeepSeek-V3 included, without being told what it is."""
    _, job, result = trained
    config = configure(tmp_path / "next", f"model={{path: {result.checkpoint}}}", "max_steps=1")
    again = prepare(config, None, lambda line: None)
    assert (again.attachment is None) == (job.attachment is None)
    for name, value in job.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
