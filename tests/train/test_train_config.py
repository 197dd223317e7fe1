"""The training config as a user writes it, and every value that it refuses."""

import re
from pathlib import Path

import pytest

import expertly.cli
from expertly.config import dump, load
from expertly.errors import ExpertlyError
from expertly.train.config import TrainConfig

DOC = Path(__file__).parents[2] / "docs" / "train.md"


def test_the_demo_loads():
    config = load(TrainConfig, Path(expertly.cli.__file__).with_name("demo.yaml"))
    assert config.model.num_experts == 16
    assert config.data.sources[0].path == "stdlib"


def test_the_documented_example_loads(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", DOC.read_text(), flags=re.S)
    assert example is not None
    (tmp_path / "run.yaml").write_text(example[1])
    assert load(TrainConfig, tmp_path / "run.yaml").model.family


def test_what_is_dumped_loads_equal(configure, tmp_path):
    config = configure(tmp_path, "router.options={renormalize: true}", "report_to=[tensorboard]")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "again.yaml") == config


def test_a_leaf_may_be_given_bare(configure, tmp_path):
    config = configure(tmp_path, "router_learning_rate=0", "top_k=1", "bf16=true")
    assert config.optim.router_learning_rate == 0
    assert config.router.top_k == 1
    assert config.schedule.bf16


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.learning_rat=1", "optim.learning_rate"),
        ("model.learning_rate=1", "optim.learning_rate"),
        ("router.aux_loss_coef=1", "router_aux_loss_coef"),
        ("modle.family=llama", "model"),
    ],
)
def test_an_unknown_key_gets_a_hint(configure, tmp_path, override, hint):
    with pytest.raises(ExpertlyError, match=rf"E201.*FIX: write .*{hint}"):
        configure(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.family=''", "either model.path or model.family"),
        ("model.path=somewhere", "either model.path or model.family"),
        ("model={path: somewhere, twin: true}", "built from a family's sizes"),
        (
            "model={path: somewhere, num_experts: 4}",
            "model.num_experts: model.path fixes the sizes",
        ),
        ("model={path: somewhere, extra: {a: 1}}", "model.extra: model.path fixes"),
        ("expert_dropout=1", "from 0 to below 1"),
        ("expert_dropout=-0.1", "from 0 to below 1"),
        ("router_aux_loss_coef=-1", "must not be negative"),
        ("sequence_aux_loss_coef=-1", "must not be negative"),
        ("router_z_loss_coef=-1", "must not be negative"),
        ("bias_update_rate=-1", "must not be negative"),
        ("optim.learning_rate=0", "must be above 0"),
        ("router_learning_rate=-1", "0 freezes the router"),
        ("weight_decay=-1", "must not be negative"),
        ("max_grad_norm=-1", "must not be negative"),
        ("adam_beta1=1", "from 0 to below 1"),
        ("adam_beta2=-0.5", "from 0 to below 1"),
        ("adam_epsilon=0", "must be above 0"),
        ("max_steps=0", "at least 1"),
        ("per_device_train_batch_size=0", "at least 1"),
        ("gradient_accumulation_steps=0", "at least 1"),
        ("warmup_ratio=1.5", "from 0 to 1"),
        ("decay_ratio=-1", "from 0 to 1"),
        ("min_lr_ratio=2", "from 0 to 1"),
        ("schedule={lr_scheduler_type: wsd, warmup_ratio: 0.9}", "longer than the run"),
        ("eval_steps=0", "at least 1"),
        ("logging_steps=0", "at least 1"),
        ("save_steps=0", "at least 1"),
        ("seed=-1", "from 0 to below"),
        ("output_dir=''", "must name a folder"),
        ("report_to=[wandb]", "expected tensorboard"),
        ("device=gpu", "expected auto or cpu or cuda"),
    ],
)
def test_a_value_that_cannot_be(yaml_file, override, why):
    with pytest.raises(ExpertlyError, match=re.escape(why)) as caught:
        load(TrainConfig, yaml_file, [override])
    assert caught.value.code == "E202"
    assert caught.value.exit_code == 2
