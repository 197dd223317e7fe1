"""Bad numbers, sick routers, too little memory, changed or damaged inputs: in this process."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import announced, contents, place, require_nothing_lost, require_same, told

from expertly.config import load
from expertly.errors import ExpertlyError, Stopped
from expertly.folders import MANIFEST, checkpoints
from expertly.train import loop
from expertly.train.config import TrainConfig
from expertly.watch.records import METRICS, read_records


@pytest.fixture
def configure(tmp_path):
    """configure("name", *overrides) -> the config of a run in its own folder."""
    return lambda name, *more: load(
        TrainConfig, place().config, [f"output_dir={tmp_path / name}", *more]
    )


@pytest.fixture
def faults(monkeypatch):
    """faults("train.loss@5:nan", ...) orders them; without any there are none."""
    return lambda *orders: monkeypatch.setenv("EXPERTLY_FAULT", ",".join(orders))


@pytest.fixture
def watched(monkeypatch):
    """What every step did: (batch from 1, whether a weight moved, its Step)."""
    real, seen = loop.train_step, []

    def train_step(config, job, *rest):
        before = [each.detach().clone() for each in job.model.parameters()]
        done = real(config, job, *rest)
        same = all(map(torch.equal, before, job.model.parameters()))
        seen.append((job.batches.drawn // 4, not same, done))
        return done

    monkeypatch.setattr(loop, "train_step", train_step)
    return seen


# --- B9: not a number ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_b9_a_bad_batch_is_skipped(kind, configure, faults, watched, capsys):
    faults(f"train.loss@5:{kind}", f"train.loss@6:{kind}")
    run = loop.run(configure("run", "max_steps=9")).run
    assert [moved for _, moved, _ in watched] == [True] * 4 + [False] * 2 + [True] * 3
    skipped = [each for each in told(run) if "skipped" in each]
    assert [each["step"] for each in skipped] == [5, 6]
    rows = [each["skipped"]["rows"] for each in skipped]
    for before, after in zip([*rows[:1]], rows[1:], strict=True):  # those of a batch, in a row
        drawn = [last - first for first, last in before.values()]
        assert sum(drawn) == 4
        assert all(after[name][0] == last for name, (_, last) in before.items() if name in after)
    number = "nan" if kind == "nan" else "inf"
    said = capsys.readouterr().err
    assert f"warning: step 5: loss {number}, gradient norm nan" in said or "norm inf" in said
    assert "the batch is skipped, rows {" in said
    require_nothing_lost(run, [3, 6, 9])


def test_b9_a_bad_batch_is_gone_back_from(configure, faults, watched):
    faults("train.loss@8:nan")
    whole = loop.run(configure("run", "optim.on_bad_step=roll_back"))
    assert [batch for batch, _, _ in watched] == list(range(1, 27)), "no batch twice"
    assert [batch for batch, moved, _ in watched if not moved] == [8]
    back = [each for each in told(whole.run) if "rolled_back" in each]
    assert len(back) == 1
    assert (back[0]["step"], back[0]["rolled_back"]["from"]) == (7, 8)
    assert sum(last - first for first, last in back[0]["rolled_back"]["rows"].values()) == 4
    steps = [each["step"] for each in told(whole.run) if "train" in each]
    assert steps == list(range(1, 25)), "each step once"
    # and a run that is stopped behind it, or begun again, is that same one
    for number, fault in enumerate(("train.step@10:error", "train.step@12:term")):
        faults("train.loss@8:nan", fault)
        config = configure(f"again-{number}", "optim.on_bad_step=roll_back")
        with pytest.raises((RuntimeError, Stopped)):
            loop.run(config)
        faults("train.loss@8:nan")
        require_same(loop.run(config, resume=True).run, whole.run)


def test_b9_a_bad_batch_before_the_first_checkpoint_begins_anew(configure, faults, watched):
    faults("train.loss@2:inf")
    run = loop.run(configure("run", "optim.on_bad_step=roll_back", "max_steps=3")).run
    assert [(batch, moved) for batch, moved, _ in watched] == [
        (1, True), (2, False), (3, True), (4, True), (5, True),
    ]  # fmt: skip
    assert [each["step"] for each in told(run) if "train" in each] == [1, 2, 3]


def test_b9_a_bad_batch_ends_the_run(configure, faults, watched):
    faults("train.loss@5:nan")
    config = configure("run", "optim.on_bad_step=stop")
    with pytest.raises(ExpertlyError) as caught:
        loop.run(config)
    assert (caught.value.code, caught.value.exit_code) == ("E501", 5)
    assert "step 5: loss nan, gradient norm nan; no update was made. FIX: go on with" in str(
        caught.value
    )
    assert [moved for _, moved, _ in watched] == [True] * 4 + [False]
    run = Path(config.output_dir)
    require_nothing_lost(run, [3])
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    assert not (run / "receipt.json").exists()


def test_b9_a_skipped_look_at_the_experts_is_not_another_steps(configure, faults):
    """Step 10 looks at output norms; it is refused, and what it saw is nobody's."""
    faults("train.loss@10:nan", "train.step@11:term")
    config = configure("run", "max_steps=12", "log.save_steps=5")
    with pytest.raises(Stopped):
        loop.run(config)
    faults("train.loss@10:nan")
    resumed = loop.run(config, resume=True).run
    whole = loop.run(configure("whole", "max_steps=12", "log.save_steps=5")).run
    require_same(resumed, whole)


def test_g8_one_step_in_twenty_is_poisoned(configure, faults, watched, count):
    steps = count(200, 1000)
    more = [f"max_steps={steps}", "save_steps=5000", "eval_steps=5000", "logging_steps=50"]
    clean = loop.run(configure("clean", *more))
    watched.clear()
    kinds = {step: ("nan", "inf", "spike")[step // 20 % 3] for step in range(30, steps, 20)}
    faults(*(f"train.loss@{step}:{kind}" for step, kind in kinds.items()))
    poisoned = loop.run(configure("poisoned", *more))
    assert [batch for batch, moved, _ in watched if not moved] == list(kinds)
    skipped = [each["step"] for each in told(poisoned.run) if "skipped" in each]
    assert skipped == list(kinds), "those and no clean one"
    assert abs(poisoned.loss / clean.loss - 1) < 0.02
    assert math.isfinite(poisoned.loss)


# --- B10: a jump --------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "last"), [("skip", 41), ("roll_back", 49)])
def test_b10_a_jump_moves_nothing_and_the_window_survives(policy, last, configure, faults, watched):
    """last: the batch behind the checkpoint of step 40."""
    order = ["train.loss@34:nan", "train.loss@36:spike", "train.loss@40:spike"]
    more = ["max_steps=42", "save_steps=8", f"optim.on_bad_step={policy}", "optim.max_bad_steps=3"]
    faults(*order)
    whole = loop.run(configure("whole", *more))
    assert [batch for batch, moved, _ in watched if not moved] == [34, 36, 40]
    assert [done.bad.code for _, _, done in watched if done.bad] == ["E501", "E502", "E502"]
    limits = [float(done.bad.why.split()[-1]) for _, _, done in watched if done.bad][1:]
    assert all(3 < limit < 10 for limit in limits), "neither NaN nor a jump entered the window"
    progress = json.loads((whole.checkpoint / "expertly/progress.json").read_text())
    assert max(progress["guard"]["losses"]) < 10
    for batch in (38, last):  # between the jumps, and behind a checkpoint that has seen them
        config = configure(f"cut-{batch}", *more)
        faults(*order, f"train.step@{batch}:error")
        with pytest.raises(RuntimeError):
            loop.run(config)
        faults(*order)
        require_same(loop.run(config, resume=True).run, whole.run)


def test_b10_jumps_can_be_let_pass(configure, faults, watched):
    faults("train.loss@24:spike")
    loop.run(configure("run", "optim.spike_sigmas=0"))
    assert all(moved for _, moved, _ in watched)


# --- B11: nothing but NaN -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_b11_permanent_nan_ends(policy, configure, faults, watched):
    faults(*(f"train.loss@{step}:nan" for step in range(5, 100)))
    config = configure("run", f"optim.on_bad_step={policy}", "optim.max_bad_steps=4")
    with pytest.raises(ExpertlyError) as caught:
        loop.run(config)
    assert (caught.value.code, caught.value.exit_code) == ("E501", 5)
    assert "no update was made. FIX: start a new run with a lower optim" in str(caught.value)
    assert [moved for _, moved, _ in watched].count(False) == 5
    run = Path(config.output_dir)
    require_nothing_lost(run, [3])
    for path in checkpoints(run):
        assert all(torch.isfinite(value).all() for value in loop_weights(path).values()), (
            "no NaN was saved"
        )
    # and again, for a job that is started again and again
    with pytest.raises(ExpertlyError, match="E501"):
        loop.run(config, resume=True)


def loop_weights(checkpoint):
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


# --- B12 and B13: sick routers ------------------------------------------------------------------

BIASED = ["router.router=biased_sigmoid_topk", "router.allow_non_stock=true"]


@pytest.fixture
def made_sick(monkeypatch):
    """made_sick(spoil): every run from the beginning starts with spoil(job)."""
    real = loop.prepare

    def order(spoil):
        def prepare(config, checkpoint, say):
            job = real(config, checkpoint, say)
            if checkpoint is None:
                with torch.no_grad():
                    spoil(job)
            return job

        monkeypatch.setattr(loop, "prepare", prepare)

    return order


def overcrowd(layer, experts):
    """A selection bias of +10 on some experts, as many as a token is sent to."""

    def spoil(job):
        job.attachment.bias[layer][experts] += 10

    return spoil


def test_b12_a_collapse_is_named_in_time(configure, made_sick, count, capsys):
    for number in range(count(1, 20)):
        layer, expert = number % 2, number % 8
        made_sick(overcrowd(layer, [expert]))
        more = [*BIASED, "max_steps=50", "save_steps=5000", "eval_steps=5000", f"seed={number}"]
        config = configure(f"run-{number}", "model.num_experts=8", "top_k=1", *more)
        with pytest.raises(ExpertlyError, match=r"E101.* experts that received no token"):
            loop.run(config)
        run = Path(config.output_dir)
        raised = [each["alarm"] for each in read_records(run / METRICS) if "alarm" in each]
        found = [each for each in raised if each["kind"] == "collapse" and each["layer"] == layer]
        assert found
        assert found[0]["experts"] == [expert]
        assert found[0]["step"] <= 50
        said = capsys.readouterr().err
        assert f"collapse: layer {layer}, expert {expert}: " in said
        assert f"Advice: {found[0]['advice']}" in said


@pytest.fixture
def eight(configure):
    """eight("name", *overrides): of 8 experts and 40 steps."""
    more = [*BIASED, "model.num_experts=8", "max_steps=40", "save_steps=10", "eval_steps=40"]
    return lambda name, *others: configure(name, *more, *others)


def test_b12_a_collapse_ends_a_run_that_asks_for_it(eight, made_sick):
    made_sick(overcrowd(1, [2, 5]))
    config = eight("run", "router.on_collapse=stop")
    with pytest.raises(ExpertlyError) as caught:
        loop.run(config)
    assert (caught.value.code, caught.value.exit_code) == ("E503", 5)
    assert re.search(
        r"E503\] step \d+, layer 1, experts 2, 5: .*: router.on_collapse=stop. FIX: go on with "
        "--resume router.on_collapse=rebalance",
        str(caught.value),
    )
    require_nothing_lost(Path(config.output_dir), [10])


def test_b12_a_collapsed_router_recovers_and_a_resumed_one_too(eight, made_sick, faults, capsys):
    made_sick(overcrowd(1, [2, 5]))
    whole = loop.run(eight("whole", "router.on_collapse=rebalance"))
    records = read_records(whole.run / METRICS)
    rebalanced = [each["step"] for each in records if "rebalanced" in each]
    assert len(rebalanced) == 1
    assert rebalanced[0] < 20
    load = read_records(whole.run / "router.jsonl")[-2]["load"][1]
    assert max(load) < 0.4, "the router spreads its tokens again"
    said = capsys.readouterr().err
    assert f"rebalanced at step {rebalanced[0]}: routers of layers [1] drawn anew" in said
    # cut just before, just behind and long after it
    for number, step in enumerate((rebalanced[0] - 2, rebalanced[0] + 1, 35)):
        faults(f"train.step@{step}:term")
        config = eight(f"cut-{number}", "router.on_collapse=rebalance")
        with pytest.raises(Stopped):
            loop.run(config)
        faults()
        require_same(loop.run(config, resume=True).run, whole.run)


def test_b13_an_expert_that_answers_nothing(configure, made_sick, faults):
    """Frozen at 0, or it would learn to speak again; its load looks even all the while."""

    def mute(job):
        weights = job.attachment.layers[0].experts.down_proj
        weights[1] = 0
        weights.requires_grad_(False)

    def run(name, resume=False):
        return loop.run(configure(name, "max_steps=30", "save_steps=12"), resume=resume).run

    made_sick(mute)
    whole = run("whole")
    raised = [each["alarm"] for each in read_records(whole / METRICS) if "alarm" in each]
    silent = [each for each in raised if each["kind"] == "silent"]
    assert [(each["layer"], each["experts"]) for each in silent] == [(0, [1])]
    assert silent[0]["step"] <= 50
    norms = [each["norms"] for each in read_records(whole / "router.jsonl") if "norms" in each]
    assert norms[0][0][1] == 0 < norms[0][0][0]


def test_g9_healthy_runs_raise_no_collapse(configure, count):
    for seed in range(count(1, 20)):
        more = [f"seed={seed}", "max_steps=100", "save_steps=500", "eval_steps=500"]
        run = loop.run(configure(f"run-{seed}", *more, "log.logging_steps=20")).run
        raised = [each["alarm"] for each in read_records(run / METRICS) if "alarm" in each]
        assert [each for each in raised if each["kind"] in ("collapse", "silent")] == []


# --- B14: out of memory -------------------------------------------------------------------------


def test_b14_the_advice_after_out_of_memory_works(tmp_path):
    """A real limit, on what a process may take beyond what it has after its imports."""
    server, config, _, _ = place()
    run = tmp_path / "run"
    settings = ["max_steps=1", "per_device_train_batch_size=1024"]
    advised = []
    for _ in range(6):
        process = server.start(config, run, *settings, *advised, limits={"RLIMIT_AS": 256 * 2**20})
        code, said = process.code(), process.said()
        if code == 0:
            break
        assert code == 4, said
        line = said.splitlines()[-1]
        found = re.fullmatch(
            r"expertly: error\[E402\] training: out of memory(?:: need \S+ [kMG]B more)?, "
            r"\S+ [kMG]B in use\. FIX: add --resume (.+)",
            line,
        )
        assert found, said
        advised = found[1].split()
    assert code == 0, said
    assert advised, "it was too little memory at first"
    assert checkpoints(run)[-1].name == "checkpoint-1"
    require_nothing_lost(run, [1])


def test_b14_a_gpu_that_is_full(configure, monkeypatch):
    def train_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a")

    monkeypatch.setattr(loop, "train_step", train_step)
    settings = ["per_device_train_batch_size=1", "schedule.gradient_checkpointing=true"]
    for given, fix in (
        ([], "per_device_train_batch_size=2 schedule.gradient_accumulation_steps=2"),
        (settings[:1], "add --resume schedule.gradient_checkpointing=true"),
        (settings, "start a new run with data.sequence_length=16"),
    ):
        with pytest.raises(ExpertlyError, match="E402") as caught:
            loop.run(configure(f"run-{len(given)}", *given))
        assert caught.value.exit_code == 4
        assert re.search(r"need 2.68 GB more, .* in use\. FIX: ", str(caught.value))
        assert str(caught.value).endswith(fix)


# --- B17: changed inputs ------------------------------------------------------------------------


def test_b17_a_resume_with_something_changed(tmp_path):
    texts = shutil.copytree(place().config.parent, tmp_path / "texts", ignore=only_texts)
    file = texts / "run.yaml"
    file.write_text(place().config.read_text().replace(str(place().config.parent), str(texts)))

    def configure(*more):
        return load(TrainConfig, file, [f"output_dir={tmp_path / 'run'}", "max_steps=3", *more])

    run = loop.run(configure()).run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(said, *more):
        with pytest.raises(ExpertlyError, match=said) as caught:
            loop.run(configure(*more), resume=True)
        assert (caught.value.code, caught.value.exit_code) == ("E206", 2)
        after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert after.keys() == before.keys()
        assert all(after[path] == before[path] for path in after if path.name != ".lock")

    refused(r"optim.learning_rate: 0.003 -> 0.1\. FIX", "learning_rate=0.1")
    refused("schedule.per_device_train_batch_size: 4 -> 2", "per_device_train_batch_size=2")
    other = tmp_path / "tokenizer"
    shutil.copytree(run / "checkpoint-3", other)
    refused(r"data.tokenizer: .* -> .*/tokenizer", f"data.tokenizer={other}")
    words = (texts / "words.txt").read_text()
    (texts / "words.txt").write_text(words.replace("red", "blue"))
    refused(r"data order \((tokens|shares)\): was .*, is ")
    (texts / "words.txt").write_text(words)
    assert loop.run(configure(), resume=True).steps == 3


def only_texts(folder, names):
    return [name for name in names if not name.endswith(".txt")]


# --- B18: damaged checkpoints -------------------------------------------------------------------


def flip(checkpoint):
    file = checkpoint / "expertly/optimizer.safetensors"
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 4
    file.write_bytes(spoilt)


def cut(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


def emptied(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(flip, "sha256 mismatch", id="flipped"),
        pytest.param(cut, r"\d+ of \d+ bytes", id="cut"),
        pytest.param(without_a_manifest, "its MANIFEST.json is missing", id="no manifest"),
        pytest.param(emptied, "its MANIFEST.json is missing", id="empty"),
    ],
)
def test_b18_the_one_before_the_damaged_newest(spoil, why, configure, capsys):
    unbroken = place().unbroken
    config = configure("run")
    run = Path(config.output_dir)
    shutil.copytree(unbroken, run, ignore=shutil.ignore_patterns("receipt.json", "checkpoint-24"))
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(unbroken), str(run))
    )
    spoil(run / "checkpoint-21")
    result = loop.run(config, resume=True)
    said = capsys.readouterr().err
    assert re.search(rf"checkpoint-21\S*: {why}. Kept as checkpoint-21.damaged\n", said)
    assert "going on from checkpoint-18, the newest whole checkpoint" in said
    assert announced(said) == [21, 24]
    assert (run / "checkpoint-21.damaged").is_dir()
    assert contents(run / "checkpoint-21") == contents(unbroken / "checkpoint-21")
    require_same(result.run, unbroken)
