"""Thousands of damaged configs: each is planned in full, or refused in one line; none hangs."""

import inspect
import json
import re
import signal
from collections import Counter
from itertools import islice

import pytest
from damaged import KINDS_OF_VALUES, is_quick, keys_of, mutant, unknown_mutant

from expertly.cli.plan import plan as verb
from expertly.cli.plan_page import page
from expertly.cli.plan_question import question_of, shape_of_target
from expertly.errors import ExpertlyError
from expertly.plan.job import plan
from expertly.plan.known import known
from expertly.plan.shape import total
from expertly.watch.records import finite

SECONDS = 2  # of the processor, for one plan; it takes some hundredths
LINE = re.compile(r"error\[E\d{3}\] [^\n]+: [^\n]+\. FIX: [^\n]+")
FLAGS = {name: said.default for name, said in inspect.signature(verb).parameters.items()}
ASKED = (
    {},
    {},
    {"vs": "llama-3.2-1b"},
    {"gpu": "4090", "gpus": 2, "batch": 64, "kv_bits": 8},
    {"memory": "24GB", "bits": "3,attention=4", "offload": "pcie4"},
    {"method": "qlora", "fsdp": 4, "ep": 2, "tuning_tokens": "5M"},
)


def outcome(data, file, asked, seconds=SECONDS):
    """The word answer, or the error's code; raises what should not happen."""
    file.write_bytes(data)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        found = plan(question_of(str(file), {**FLAGS, **asked}))
        text = page(found)
    except ExpertlyError as error:
        assert LINE.fullmatch(str(error))
        assert error.exit_code in (2, 3), error
        return error.code
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    json.dumps(finite(found), allow_nan=False)
    assert not re.search(r"\b(nan|inf|None)\b", text), text
    assert 0 < found["parameters"]["active"] <= found["parameters"]["total"]
    assert 0 < found["weights_bytes_touched"] <= found["weights_bytes"]
    assert all(model["decode_tokens_per_second"] > 0 for model in found["models"])
    return "answer"


def outcomes(mutants, file):
    """How many there are of each outcome; fails with the mutants that came to something else."""
    said, wrong = Counter(), []
    for number, data in mutants:
        try:
            said[outcome(data, file, ASKED[number % len(ASKED)])] += 1
        except BaseException as error:  # noqa: BLE001  whatever it is, it is a finding
            wrong.append((number, type(error).__name__, str(error)[:300], data[:300]))
    assert not wrong, (len(wrong), wrong[:5])
    return said


@pytest.fixture
def limited():
    """A hang ends in an error."""

    def late(signum, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, late)
    yield
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("asked", [{}, {"vs": "llama-3.2-1b", "memory": "24GB", "batch": 64}])
def test_every_built_in_model_is_answered(asked, tmp_path, limited):
    for name, config in known().items():
        data = json.dumps(config).encode()
        assert outcome(data, tmp_path / "config.json", asked) == "answer", name


def test_2000_damaged_configs_are_planned_or_one_line(tmp_path, limited):
    made = ((number, mutant(number)) for number in range(10_000))
    quick = ((number, data) for number, data in made if is_quick(data))
    said = outcomes(islice(quick, 2000), tmp_path / "config.json")
    assert said.total() == 2000
    assert said["answer"] > 400
    assert said.total() - said["answer"] > 400
    assert set(said) <= {"answer", "E208", "E301", "E305", "E306"}


def test_whatever_a_key_says_it_is_counted_or_one_line(tmp_path):
    """Of a model of every family, each key that formulas read, with an odd value of every kind."""
    families = {config["model_type"]: config for config in known().values()}
    said = Counter()
    for config in families.values():
        for key in {*config, *keys_of(config)} - {"model_type"}:
            for value in KINDS_OF_VALUES:
                changed = {"use_sliding_window": True, **config, key: value}
                said[counted(changed, tmp_path / "config.json")] += 1
    assert min(said["shape"], said["E305"]) > 1000
    assert set(said) == {"shape", "E305"}


def counted(config, file):
    """The word shape, or the error's code."""
    file.write_text(json.dumps(config))
    try:
        total(shape_of_target(str(file)))
    except ExpertlyError as error:
        return error.code
    return "shape"


def test_damaged_configs_of_other_families_are_planned_or_one_line(tmp_path, limited):
    outcome(unknown_mutant(0), tmp_path / "config.json", {}, seconds=60)  # imports torch
    made = [(number, unknown_mutant(number)) for number in range(42)]
    said = outcomes(made, tmp_path / "config.json")
    assert min(said["answer"], said["E305"]) >= 10
    assert set(said) <= {"answer", "E305", "E306", "E208"}
