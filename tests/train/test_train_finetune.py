"""Fine-tuning: adapters and conversations in the training loop, checkpoints, receipts, merging."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from expertly.config import load
from expertly.errors import ExpertlyError
from expertly.folders import save_folder
from expertly.models.build import build_model, model_config, twin_config
from expertly.models.files import read_headers
from expertly.models.inspect import inspect_folder
from expertly.models.layers import moe_layers
from expertly.models.loading import open_model, save_model
from expertly.receipts import read
from expertly.train import merge
from expertly.train.config import TrainConfig
from expertly.train.finetune import Recipe, run, train_config
from expertly.train.setup import prepare
from expertly.watch.records import METRICS, read_records

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SMALL = (
    "data.sequence_length=48",
    "data.eval_tokens=200",
    "schedule.num_train_epochs=0",
    "schedule.max_steps=6",
    "schedule.per_device_train_batch_size=2",
    "eval.eval_steps=6",
    "log.logging_steps=2",
    "log.save_steps=3",
    "optim.learning_rate=1e-2",
)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Forty dialogues of the words that the tiny tokenizer knows, and a chat template."""
    folder = tmp_path_factory.mktemp("talk")
    names = ["cat", "dog", "tree", "red cat"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"the {names[i % 4]} and {i}"},
                {"role": "assistant", "content": f"see the {names[(i + 1) % 4]}"},
            ]
        }
        for i in range(40)
    ]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "base.txt").write_text("the dog and the red tree see the cat " * 60)
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def asked(talk, tiny_folder):
    """asked(output_dir, "key=value", ..., **recipe) -> TrainConfig of six steps."""

    def make(output_dir, *overrides, family="qwen3_moe", **recipe):
        said = Recipe(
            model=str(tiny_folder(family)),
            data=(str(talk / "talk.jsonl"),),
            output_dir=str(output_dir),
            base_data=(str(talk / "base.txt"),),
            **{"rank": 4, **recipe},
        )
        template = f"data.chat_template={talk / 'chat.jinja'}"
        return train_config(said, [template, *SMALL, *overrides])

    return make


@pytest.fixture(scope="module")
def tuned(asked, tmp_path_factory):
    """A finished run with a frozen router, its result and config."""
    config = asked(tmp_path_factory.mktemp("runs") / "run")
    return run(config, quiet), config


def test_adapters_learn_and_the_router_stands_still(tuned):
    result, _ = tuned
    before, now = result.loss["talk"]
    assert now < before
    assert set(result.loss) == {"talk", "base:base"}
    assert int(result.changed["experts"].removesuffix(" of 16")) > 8
    assert result.changed["routers"] == "0 of 2"
    receipt = read(result.run)
    assert receipt.verdict == "pass"
    checks = {check.name: check.figure for check in receipt.checks}
    assert checks["frozen routers that changed"] == 0
    assert receipt.figures["adapters"]["router"]["weights"] == 0
    assert receipt.figures["adapters"]["experts"]["weights"] == 4
    assert receipt.figures["learning_parameters"] == result.learning_parameters
    assert result.page.read_text().startswith("<!doctype html>")
    drift = json.loads((result.run / "drift.json").read_text())
    assert set(drift["domains"]) == {"talk", "base:base"}


def test_losses_of_records_and_of_the_drift_report_agree(tuned):
    result, _ = tuned
    records = [each for each in read_records(result.run / METRICS) if "eval" in each]
    first, last = records[0]["eval"]["domain"], records[-1]["eval"]["domain"]
    for domain, (before, now) in result.loss.items():
        assert first[domain] == pytest.approx(before, abs=2e-4)
        assert last[domain] == pytest.approx(now, abs=2e-4)


def test_a_checkpoint_reloads_in_stock_peft(tuned):
    result, config = tuned
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        ours = open_model(result.checkpoint)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(config.model.path)
        stock = PeftModel.from_pretrained(base, str(result.checkpoint))(ids).logits
    assert torch.allclose(ours, stock, atol=1e-5)
    assert not torch.allclose(ours, open_model(config.model.path)(ids).logits, atol=1e-2)


def test_where_a_model_is_wanted_an_adapter_says_what_it_is(tuned):
    result, _ = tuned
    with pytest.raises(
        ExpertlyError, match=r"E305.*holds an adapter, and no model.*expertly merge"
    ):
        inspect_folder(result.checkpoint)
    with pytest.raises(ExpertlyError, match=r"E305.*no config.json in it.*checkpoint-6"):
        open_model(result.run)


def test_a_resumed_run_is_the_unbroken_one(tuned, asked, tmp_path):
    result, _ = tuned
    broken = tmp_path / "run"
    shutil.copytree(result.run, broken)
    shutil.rmtree(broken / "checkpoint-6")
    again = run(asked(broken), quiet, resume=True)
    assert again.loss == result.loss
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        there = (result.checkpoint / name).read_bytes()
        assert (again.checkpoint / name).read_bytes() == there


@pytest.mark.parametrize("router", ["trainable", "lora"])
def test_routers_that_learn_change_and_are_saved(router, asked, tmp_path):
    config = asked(tmp_path / "run", "optim.learning_rate=3e-2", router=router)
    if router == "trainable":
        assert config.optim.router_learning_rate == pytest.approx(0.1 * 2e-4)
        config = asked(tmp_path / "run", "optim.router_learning_rate=1e-2", router=router)
    result = run(config, quiet)
    assert result.changed["routers"] == "2 of 2"
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        ours = open_model(result.checkpoint)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(config.model.path)
        stock = PeftModel.from_pretrained(base, str(result.checkpoint))(ids).logits
    assert torch.allclose(ours, stock, atol=1e-5)


def test_all_weights_learn_without_adapters(asked, tmp_path):
    config = asked(tmp_path / "run", "optim.learning_rate=1e-3", method="full")
    assert config.lora.r == 0 and config.model.expert_dropout == 0.1
    result = run(config, quiet)
    assert result.loss["talk"][1] < result.loss["talk"][0]
    assert result.changed["routers"] == "0 of 2"
    assert result.learning_parameters == result.parameters


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_beside_packed_experts(bits, asked, tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("qwen3_moe", moe_intermediate_size=32)
    wide = tmp_path / "wide"
    save_folder(wide, lambda folder: save_model(model, folder, tokenizer=tiny_tokenizer))
    result = run(asked(tmp_path / "run", f"model.path={wide}", bits=bits), quiet)
    assert result.loss["talk"][1] < result.loss["talk"][0]
    assert int(result.changed["experts"].removesuffix(" of 16")) > 8
    assert not (result.checkpoint / "config.json").exists()


def test_merging_keeps_the_function_and_the_stock_names(tuned, tmp_path):
    result, config = tuned
    asked = merge.MergeConfig(adapter=str(result.checkpoint), output_dir=str(tmp_path / "merged"))
    made = merge.run(asked, quiet)
    assert made.largest_logit_difference < 1e-4
    assert made.written_logit_difference < 1e-5
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(made.folder)(ids).logits
        assert torch.allclose(whole, open_model(result.checkpoint)(ids).logits, atol=1e-5)
    assert _names(made.folder) == _names(config.model.path)
    receipt = read(made.folder)
    assert receipt.job == "merge" and receipt.verdict == "pass"


def _names(folder):

    return [header.name for header in read_headers(Path(folder))]


def test_a_merge_that_changes_the_function_writes_nothing(tuned, tmp_path, monkeypatch):
    result, _ = tuned

    def wrong(model):
        merge_adapter(model)
        with torch.no_grad():
            moe_layers(model)[0].experts.down_proj[0].add_(0.1)

    merge_adapter = merge.merge_adapter
    monkeypatch.setattr(merge, "merge_adapter", wrong)
    asked = merge.MergeConfig(adapter=str(result.checkpoint), output_dir=str(tmp_path / "merged"))
    with pytest.raises(ExpertlyError, match=r"E101.*folded in.*nothing was written"):
        merge.run(asked, quiet)
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_merged_is_said_in_a_line(tuned, tiny_folder, tmp_path):
    result, config = tuned

    def refused(match, **said):
        given = {"adapter": str(result.checkpoint), "output_dir": str(tmp_path / "out"), **said}
        with pytest.raises(ExpertlyError, match=match) as caught:
            merge.run(merge.MergeConfig(**given), quiet)
        assert "\n" not in str(caught.value)
        assert [*tmp_path.iterdir()] == []

    refused("E305.*is no adapter of", base=str(tiny_folder("mixtral")))
    refused("E305.*holds no adapter", adapter=config.model.path)
    refused("E205.*exists already", output_dir=str(result.run))


@pytest.mark.parametrize(
    ("overrides", "code", "why"),
    [
        (["lora.targets=[shared_experts]"], "E202", "has no shared experts.*choose of: experts"),
        (["lora.targets=[]"], "E202", "at least one"),
        (["optim.router_learning_rate=null"], "E202", "0 leaves routers as they are"),
        (["router.top_k=1"], "E202", "cannot hold another routing rule"),
        (["optim.freeze={experts: 1}"], "E202", "lora.targets says what learns"),
        (["model.bits=3"], "E202", "must be 4 or 8"),
        (["lora.r=0"], "E202", "weights that learn are float32"),
        (
            ["lora.r=0", "model.dtype=float32", "model.bits=4"],
            "E202",
            "packed weights do not learn",
        ),
        (["data.chat_template=nowhere.jinja"], "E203", "cannot be read"),
        (['data.chat_template=""'], "E307", "no chat template"),
        (["data.sources.0.path=nowhere.jsonl"], "E303", "no such file"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(overrides, code, why, asked, tmp_path):
    with pytest.raises(ExpertlyError, match=rf"{code}.*{why}") as caught:
        prepare(asked(tmp_path / "run", *overrides), None, quiet)
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_a_router_adapter_is_for_the_method_lora(asked, tmp_path):
    with pytest.raises(ExpertlyError, match=r"E202.*lora is for method=lora"):
        asked(tmp_path / "run", method="full", router="lora")


def test_epochs_become_steps(asked, tmp_path):
    said = []
    config = asked(tmp_path / "run", "schedule.num_train_epochs=2")
    job = prepare(config, None, said.append)
    rows = job.batches.rows_per_epoch
    assert job.config.schedule.max_steps == rows  # 2 epochs, 2 rows a step
    assert any(f"2 epochs of {rows} rows are {rows} steps" in line for line in said)
    assert any("router frozen" in line and "experts 4 weights" in line for line in said)


def test_a_model_that_mixes_rows_gets_one_example_in_each(asked, tmp_path):
    said, rows = [], {}
    for family in ("mixtral", "gpt_oss"):
        job = prepare(asked(tmp_path / "run", family=family), None, said.append)
        rows[family] = job.batches.rows_per_epoch
    assert rows["gpt_oss"] == len(job.sets[0].train) > rows["mixtral"]
    assert sum("gpt_oss mixes texts" in line for line in said) == 1


def test_a_dense_model_is_refused_before_it_is_trained(asked, tiny_sizes, tmp_path, tiny_tokenizer):
    from expertly.folders import save_folder
    from expertly.models.loading import save_model

    dense = build_model(twin_config(model_config("qwen3_moe", tiny_sizes("qwen3_moe"))))
    save_folder(tmp_path / "dense", lambda f: save_model(dense, f, tokenizer=tiny_tokenizer))
    config = asked(tmp_path / "run", f"model.path={tmp_path / 'dense'}")
    with pytest.raises(ExpertlyError, match=r"E202.*has no experts"):
        prepare(config, None, quiet)
    with pytest.raises(ExpertlyError, match=r"E305.*has no experts"):
        run(config, quiet)
    assert not (tmp_path / "run").exists()


def test_the_config_is_written_and_read_again(tuned):
    result, config = tuned
    assert load(TrainConfig, result.run / "config.yaml") == config
