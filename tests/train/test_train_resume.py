"""A resumed run is the unbroken one, to the bit; and what is in the way of one."""

import json
import shutil
from pathlib import Path

import pytest
from train_models import latent_overrides

from expertly import receipts
from expertly.errors import ExpertlyError
from expertly.folders import sha256
from expertly.train import loop
from expertly.watch.records import METRICS, ROUTER, read_records

# random states matter: jitter and dropout draw, and two micro-batches are counted first
COMMON = [
    "router.jitter=0.05",
    "model.expert_dropout=0.1",
    "schedule.gradient_accumulation_steps=2",
    "schedule.per_device_train_batch_size=2",
    "log.save_steps=2",
    "router.sequence_aux_loss_coef=0.01",
]
MODELS = {
    "qwen3_moe": ["router.capacity_factor=1.5"],
    "deepseek_v3": [*latent_overrides(), "router.bias_update_rate=0.01"],
    "a bias of our own": [
        "router.router=biased_sigmoid_topk",
        "router.bias_update_rate=0.01",
        "router.allow_non_stock=true",
    ],
}


@pytest.fixture(scope="module", params=list(MODELS))
def unbroken(request, tmp_path_factory, configure):
    """(overrides, result) of a run of 12 steps in one go."""
    overrides = [*COMMON, *MODELS[request.param]]
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return overrides, loop.run(configure(folder, *overrides))


def stopped_at(step: int, run: Path, target: Path) -> Path:
    """A copy of a run as a crash after `step` leaves it: later records, and a torn last line."""
    target.mkdir()
    for name in ("config.yaml", METRICS, ROUTER):
        shutil.copy(run / name, target)
    with (target / METRICS).open("a") as stream:
        stream.write('{"step": 12, "tok')
    for at in range(2, step + 1, 2):
        shutil.copytree(run / f"checkpoint-{at}", target / f"checkpoint-{at}")
    return target


def told(run: Path, file: str = METRICS) -> list[dict]:
    """A run's records without the clock's numbers."""
    records = read_records(run / file)
    for record in records:
        del record["seconds"]
        record.get("train", {}).pop("tokens_per_second", None)
    return records


@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_resumed_is_unbroken_to_the_bit(unbroken, step, tmp_path, configure):
    overrides, whole = unbroken
    run = stopped_at(step, whole.run, tmp_path / "run")
    resumed = loop.run(configure(run, *overrides), resume=True)
    assert resumed.checkpoint == run / "checkpoint-12"
    for name in (
        "model.safetensors",
        "expertly/optimizer.safetensors",
        "expertly/random.safetensors",
    ):
        assert sha256(resumed.checkpoint / name) == sha256(whole.checkpoint / name), name
    assert told(run) == told(whole.run)
    steps = [record["step"] for record in told(run) if "train" in record]
    assert steps == list(range(1, 13)), "each step once"
    assert told(run, ROUTER) == told(whole.run, ROUTER)
    assert (resumed.loss, resumed.domains) == (whole.loss, whole.domains)
    ours, theirs = receipts.read(run), receipts.read(whole.run)
    assert ours.verdict == "pass"
    assert (ours.changed, ours.checks, ours.figures) == (
        theirs.changed,
        theirs.checks,
        theirs.figures,
    )


def test_a_finished_run_returns_as_it_did(unbroken, tmp_path, configure):
    overrides, whole = unbroken
    run = stopped_at(12, whole.run, tmp_path / "run")
    again = loop.run(configure(run, *overrides), resume=True)
    assert again.checkpoint == run / "checkpoint-12"
    assert (again.loss, again.domains, again.router) == (whole.loss, whole.domains, whole.router)
    assert (again.steps, again.tokens, again.seconds) == (12, whole.tokens, whole.seconds)
    assert told(run) == told(whole.run), "its evaluation is not written down twice"
    assert receipts.read(run).changed == receipts.read(whole.run).changed


class Gone(Exception):
    """The machine went away."""


def stop_after(step: int, monkeypatch) -> None:
    real = loop.train_step

    def train_step(config, job, recorder, guard, at):
        if at == step:
            raise Gone
        return real(config, job, recorder, guard, at)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_stop_between_checkpoints(unbroken, tmp_path, configure, monkeypatch):
    overrides, whole = unbroken
    config = configure(tmp_path / "run", *overrides)
    with monkeypatch.context() as patch, pytest.raises(Gone):
        stop_after(5, patch)
        loop.run(config)
    assert read_records(tmp_path / "run" / METRICS)[-1]["step"] == 5
    resumed = loop.run(config, resume=True)
    name = "checkpoint-12/model.safetensors"
    assert sha256(tmp_path / "run" / name) == sha256(whole.run / name)
    assert told(tmp_path / "run") == told(whole.run)
    assert resumed.tokens == whole.tokens


@pytest.fixture
def short(tmp_path, configure):
    """A config of 2 steps, saved at the end only."""
    return lambda *more: configure(tmp_path / "run", "max_steps=2", "save_steps=9", *more)


def test_a_run_stopped_before_its_first_checkpoint_starts_over(short, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Gone):
        stop_after(1, patch)
        loop.run(short())
    result = loop.run(short(), resume=True)
    assert result.steps == 2
    assert [r["step"] for r in read_records(result.run / METRICS)] == [0, 1, 2, 2]


def test_a_folder_with_a_run_in_it_is_left_alone(short):
    result = loop.run(short())
    before = {file: file.stat().st_mtime_ns for file in result.run.rglob("[!.]*")}
    with pytest.raises(ExpertlyError, match=r"E205.*holds a run already.*--resume"):
        loop.run(short())
    assert {file: file.stat().st_mtime_ns for file in result.run.rglob("[!.]*")} == before
    (result.run / loop.CONFIG).unlink()
    with pytest.raises(ExpertlyError, match=r"E205.*holds a run already"):
        loop.run(short())


def test_nothing_to_resume_is_a_beginning_and_said(short, capsys):
    """A job that is started again and again with the same command needs no special first time."""
    assert loop.run(short(), resume=True).steps == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_checkpoints_without_their_config_are_not_begun_again(short):
    result = loop.run(short())
    (result.run / loop.CONFIG).unlink()
    with pytest.raises(ExpertlyError, match=r"E205.*put its config.yaml back"):
        loop.run(short(), resume=True)


def test_a_changed_config_is_refused_with_every_difference(short, tmp_path):
    loop.run(short())
    with pytest.raises(ExpertlyError) as caught:
        loop.run(short("learning_rate=0.5", "schedule.warmup_ratio=0.5"), resume=True)
    assert caught.value.code == "E206"
    assert "optim.learning_rate: 0.01 -> 0.5; schedule.warmup_ratio: 0.05 -> 0.5" in str(
        caught.value
    )
    free = ["logging_steps=2", "device=cpu", f"data.cache_dir={tmp_path / 'elsewhere'}"]
    assert loop.run(short(*free), resume=True).steps == 2


def test_changed_data_is_refused(tmp_path, texts, configure):
    copy = tmp_path / "words.txt"
    shutil.copy(texts / "words.txt", copy)
    only = [
        f"data.sources=[{{path: {copy}}}, {{path: {texts / 'words_held_out.txt'}, eval: true}}]"
    ]
    config = configure(tmp_path / "run", "max_steps=2", *only, f"data.tokenizer={tmp_path / 'own'}")
    first = configure(tmp_path / "first", "max_steps=1", *only)
    shutil.copytree(loop.run(first).checkpoint, tmp_path / "own")
    loop.run(config)
    copy.write_text(copy.read_text().replace("red", "blue"))
    with pytest.raises(ExpertlyError, match=r"E206.*data order \(tokens\)"):
        loop.run(config, resume=True)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("model.safetensors", "E302", id="another byte"),
        pytest.param("expertly/optimizer.safetensors", "E302", id="moments"),
        pytest.param("expertly/progress.json", "E301", id="missing"),
        pytest.param("MANIFEST.json", "E301", id="no manifest"),
    ],
)
def test_without_a_whole_checkpoint_nothing_begins_again(short, name, code):
    result = loop.run(short())
    file = result.checkpoint / name
    if code == "E302":
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(damaged)
    else:
        file.unlink()
    fix = "copy one back, or delete all in .* to start from the beginning"
    with pytest.raises(ExpertlyError, match=f"{code}.*FIX: {fix}") as caught:
        loop.run(short(), resume=True)
    assert caught.value.exit_code == 3


def test_a_config_that_had_to_be_corrected_finds_the_folder_free(short):
    with pytest.raises(ExpertlyError, match="E204"):
        loop.run(short("router.top_k=5"))
    assert loop.run(short()).steps == 2


def test_an_expert_without_tokens_fails_the_receipt(short):
    """Dead from the start: top 1 of many, for one step of few tokens."""
    many = ["num_experts=32", "router.top_k=1", "max_steps=1", "sequence_length=8"]
    config = short(*many, "per_device_train_batch_size=1")
    with pytest.raises(ExpertlyError, match=r"E101 ?\]? experts that received no token") as caught:
        loop.run(config)
    assert caught.value.exit_code == 1
    assert "FIX: raise router.router_aux_loss_coef or train longer; figures in" in str(caught.value)
    assert str(Path(config.output_dir) / "receipt.json") in str(caught.value)
    receipt = json.loads((Path(config.output_dir) / "receipt.json").read_text())
    assert receipt["verdict"] == "fail"
    failed = [check for check in receipt["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["experts that received no token"]
    assert failed[0]["figure"] >= 2 * (32 - 8)
