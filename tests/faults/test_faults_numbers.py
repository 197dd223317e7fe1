"""Losses and gradients that are no numbers, and losses that jump: in this process."""

import json
import math
from pathlib import Path

import pytest
import torch
from runs import require_nothing_lost, require_same, told

from expertly.errors import ExpertlyError, Stopped
from expertly.folders import checkpoints
from expertly.train import loop

# --- B9: not a number ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norm"), [("nan", "nan"), ("inf", "nan")])
def test_b9_a_bad_batch_is_skipped(kind, norm, run_config, faults, watched, capsys):
    faults(f"train.loss@5:{kind}", f"train.loss@6:{kind}")
    run = loop.run(run_config("run", "max_steps=9")).run
    assert [moved for _, moved, _ in watched] == [True] * 4 + [False] * 2 + [True] * 3
    skipped = [each for each in told(run) if "skipped" in each]
    assert [each["step"] for each in skipped] == [5, 6]
    rows = [each["skipped"]["rows"] for each in skipped]
    for before, after in zip([*rows[:1]], rows[1:], strict=True):  # those of a batch, in a row
        drawn = [last - first for first, last in before.values()]
        assert sum(drawn) == 4
        assert all(after[name][0] == last for name, (_, last) in before.items() if name in after)
    said = capsys.readouterr().err
    for step, each in zip((5, 6), rows, strict=True):
        numbers = f"loss {kind}, gradient norm {norm}"
        assert f"\nwarning: step {step}: {numbers}; the batch is skipped, rows {each}\n" in said
    require_nothing_lost(run, [3, 6, 9])


def test_b9_a_bad_batch_is_gone_back_from(run_config, faults, watched, count):
    faults("train.loss@8:nan")
    more = ["optim.on_bad_step=roll_back", "max_steps=15"]
    whole = loop.run(run_config("run", *more))
    assert [batch for batch, _, _ in watched] == list(range(1, 18)), "no batch twice"
    assert [batch for batch, moved, _ in watched if not moved] == [8]
    back = [each for each in told(whole.run) if "rolled_back" in each]
    assert len(back) == 1
    assert (back[0]["step"], back[0]["rolled_back"]["from"]) == (7, 8)
    assert sum(last - first for first, last in back[0]["rolled_back"]["rows"].values()) == 4
    steps = [each["step"] for each in told(whole.run) if "train" in each]
    assert steps == list(range(1, 16)), "each step once"
    # and a run that is cut or stopped behind it is that same one
    ends = ("train.step@10:error", "train.step@12:term")
    for number, fault in enumerate(count(ends[:1], ends)):
        faults("train.loss@8:nan", fault)
        config = run_config(f"again-{number}", *more)
        with pytest.raises((RuntimeError, Stopped)):
            loop.run(config)
        faults("train.loss@8:nan")
        require_same(loop.run(config, resume=True).run, whole.run)


def test_b9_a_bad_batch_before_the_first_checkpoint_begins_anew(run_config, faults, watched):
    faults("train.loss@2:inf")
    run = loop.run(run_config("run", "optim.on_bad_step=roll_back", "max_steps=3")).run
    assert [(batch, moved) for batch, moved, _ in watched] == [
        (1, True), (2, False), (3, True), (4, True), (5, True),
    ]  # fmt: skip
    assert [each["step"] for each in told(run) if "train" in each] == [1, 2, 3]


def test_b9_a_bad_batch_ends_the_run(run_config, faults, watched):
    faults("train.loss@5:nan")
    config = run_config("run", "optim.on_bad_step=stop")
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


def test_b9_a_skipped_look_at_the_experts_is_not_another_steps(run_config, faults):
    """Step 10 looks at output norms; it is refused, and what it saw is nobody's."""
    faults("train.loss@10:nan", "train.step@11:term")
    config = run_config("run", "max_steps=12", "log.save_steps=5")
    with pytest.raises(Stopped):
        loop.run(config)
    faults("train.loss@10:nan")
    resumed = loop.run(config, resume=True).run
    whole = loop.run(run_config("whole", "max_steps=12", "log.save_steps=5")).run
    require_same(resumed, whole)


def test_g8_one_step_in_twenty_is_poisoned(run_config, faults, watched, count):
    steps = count(100, 1000)
    more = [f"max_steps={steps}", "save_steps=5000", "eval_steps=5000", "logging_steps=50"]
    clean = loop.run(run_config("clean", *more))
    watched.clear()
    kinds = {step: ("nan", "inf", "spike")[step // 20 % 3] for step in range(30, steps, 20)}
    faults(*(f"train.loss@{step}:{kind}" for step, kind in kinds.items()))
    poisoned = loop.run(run_config("poisoned", *more))
    assert [batch for batch, moved, _ in watched if not moved] == list(kinds)
    skipped = [each["step"] for each in told(poisoned.run) if "skipped" in each]
    assert skipped == list(kinds), "those and no clean one"
    assert abs(poisoned.loss / clean.loss - 1) < 0.02
    assert math.isfinite(poisoned.loss)


# --- B10: a jump --------------------------------------------------------------------------------


def test_b10_a_jump_moves_nothing_and_the_window_survives(run_config, faults, watched, count):
    for policy, last in count([("skip", 41)], [("skip", 41), ("roll_back", 49)]):
        watched.clear()
        require_the_window_survives(policy, last, run_config, faults, watched)


def require_the_window_survives(policy, last, run_config, faults, watched):
    """last: the batch behind the checkpoint of step 40."""
    order = ["train.loss@34:nan", "train.loss@36:spike", "train.loss@40:spike"]
    more = ["max_steps=42", "save_steps=8", f"optim.on_bad_step={policy}", "optim.max_bad_steps=3"]
    faults(*order)
    whole = loop.run(run_config(f"{policy}-whole", *more))
    assert [batch for batch, moved, _ in watched if not moved] == [34, 36, 40]
    assert [done.bad.code for _, _, done in watched if done.bad] == ["E501", "E502", "E502"]
    limits = [float(done.bad.why.split()[-1]) for _, _, done in watched if done.bad][1:]
    assert all(3 < limit < 10 for limit in limits), "neither NaN nor a jump entered the window"
    progress = json.loads((whole.checkpoint / "expertly/progress.json").read_text())
    assert max(progress["guard"]["losses"]) < 10
    for batch in (38, last):  # between the jumps, and behind a checkpoint that has seen them
        config = run_config(f"{policy}-{batch}", *more)
        faults(*order, f"train.step@{batch}:error")
        with pytest.raises(RuntimeError):
            loop.run(config)
        faults(*order)
        require_same(loop.run(config, resume=True).run, whole.run)


def test_b10_jumps_can_be_let_pass(run_config, faults, watched):
    faults("train.loss@24:spike")
    loop.run(run_config("run", "optim.spike_sigmas=0"))
    assert all(moved for _, moved, _ in watched)


# --- B11: nothing but NaN -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_b11_permanent_nan_ends(policy, run_config, faults, watched):
    faults(*(f"train.loss@{step}:nan" for step in range(5, 100)))
    config = run_config("run", f"optim.on_bad_step={policy}", "optim.max_bad_steps=2")
    with pytest.raises(ExpertlyError) as caught:
        loop.run(config)
    assert (caught.value.code, caught.value.exit_code) == ("E501", 5)
    assert "no update was made. FIX: start a new run with a lower optim" in str(caught.value)
    assert [moved for _, moved, _ in watched].count(False) == 3
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
