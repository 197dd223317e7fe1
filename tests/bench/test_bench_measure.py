"""A plan checked on this machine: what is run, what it is held against, how it is told."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from expertly.bench import doctor, expected, machine, measure, measured, random_model, steps
from expertly.bench.expected import expect
from expertly.bench.machine import Machine, better, free_memory, read_bandwidth, resident_memory
from expertly.bench.measured import blame, busy, error, tables
from expertly.bench.predicted import as_device
from expertly.bench.random_model import tiny_model
from expertly.bench.steps import REST, parted, time_parts, time_steps, typical
from expertly.errors import ExpertlyError
from expertly.models.build import build_model
from expertly.plan.precision import precision, weights
from expertly.plan.reading import read_shape
from expertly.plan.shape import total
from expertly.plan.speed import decode, prefill

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "gpt_oss", "qwen3")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Seconds, not minutes."""
    monkeypatch.setattr(machine, "_WORKING_SET", 2**22)
    monkeypatch.setattr(doctor, "_SIZE", 64)


@pytest.fixture
def measured_here(tmp_path):
    def run(config, target=None, **options):
        shape = read_shape(config, "a model")
        options = {"prompt": 8, "new": 4, **options}
        return measure.measure(target or tmp_path / "none.json", config, shape, **options)

    return run


# --- The whole way -----------------------------------------------------------------------------


def test_a_folder_with_weights_is_opened(tiny_folder, measured_here):
    folder, said = tiny_folder("olmoe"), []
    config = json.loads((folder / "config.json").read_text())
    found = measured_here(config, folder, dtype="fp32", tell=said.append)
    assert found.opened
    assert (found.dtype, found.layers, found.whole_layers) == ("fp32", 2, 2)
    assert [run.experts for run in found.runs] == ["expertly", "grouped_mm"]
    assert found.memory.predicted == 4 * total(read_shape(config, "a model")).total
    assert len(said) == 5


def test_a_bare_config_is_measured_with_random_weights(raw, measured_here):
    found = measured_here(raw("olmoe"), dtype="bf16")
    assert not found.opened
    assert "random weights" in tables(found)[1].title
    names = {part.name for part in found.runs[0].decode.parts}
    assert names == {"embeddings", "attention", "norms", "router", "experts", "head", REST}


def test_a_dense_model_has_one_run_without_experts(raw, measured_here):
    found = measured_here(raw("qwen3", tie_word_embeddings=True))
    assert [run.experts for run in found.runs] == [None]
    parts = {part.name: part for part in found.runs[0].decode.parts}
    assert parts["head"].roofline > 0 and parts["embeddings"].roofline == 0, "the head reads it"
    assert not any("experts" in row[0] for table in tables(found) for row in table.rows)


def test_a_quantised_checkpoint_is_not_opened_and_that_is_said(tiny_folder, measured_here):
    folder = tiny_folder("olmoe")
    config = json.loads((folder / "config.json").read_text())
    found = measured_here({**config, "quantization_config": {"quant_method": "fp8"}}, folder)
    assert not found.opened
    assert "quantised" in found.notes[0]


def test_what_does_not_fit_is_cut_after_its_first_layers(raw, measured_here):
    config = raw("deepseek_v3", num_hidden_layers=4)
    shape = read_shape(config, "a model")
    two = replace(shape, layers=shape.layers[:2])
    found = measured_here(config, memory=4 * total(two).total + 1, dtype="fp32")
    assert (found.layers, found.whole_layers) == (2, 4)
    assert found.memory.predicted == 4 * total(two).total
    assert "2 of 4 layers" in tables(found)[1].title
    assert all(phase.best > 0 for run in found.runs for phase in (run.decode, run.prefill))


def test_predictions_are_the_plans_own_for_the_measured_machine(raw, measured_here):
    config = raw("mixtral")
    found = measured_here(config, dtype="fp32", prompt=8, new=4)
    shape = read_shape(config, "a model")
    formats, device = precision(shape, "fp32"), as_device(found.machine)
    for run in found.runs:
        one, whole = run.decode.overhead, run.prefill.overhead
        for phase, step in (
            (run.decode, decode(shape, formats, device, context=10, kv_bits=32, overhead=one)),
            (run.prefill, prefill(shape, formats, device, tokens=8, kv_bits=32, overhead=whole)),
        ):
            assert phase.predicted == pytest.approx(step.tokens_per_second)
            assert sum(part.predicted for part in phase.parts) == pytest.approx(step.seconds)
            assert phase.roofline > phase.predicted
            assert phase.error == pytest.approx(100 * (phase.predicted / phase.best - 1))
            for part in phase.parts:
                assert part.predicted == pytest.approx(part.roofline + part.overhead)
                assert part.gap == pytest.approx(part.measured - part.predicted)


def test_a_measurement_is_json_and_its_tables_are_rectangles(raw, measured_here):
    found = measured_here(raw("qwen2_moe"))
    assert json.loads(json.dumps(asdict(found)))["runs"][1]["experts"] == "grouped_mm"
    pages = tables(found)
    assert len(pages) == 2 + 4
    for page in pages:
        assert page.title
        assert len({len(row) for row in page.rows}) == 1
        assert all(isinstance(cell, str) for row in page.rows for cell in row)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        pytest.param({"dtype": "int4"}, "E208", "int4", id="dtype"),
        pytest.param({"prompt": 0}, "E208", "0 tokens", id="no prompt"),
        pytest.param({"new": -1}, "E208", "-1 new", id="no new token"),
        pytest.param({"memory": 100.0}, "E402", "100 bytes", id="no room"),
    ],
)
def test_what_cannot_be_measured_is_one_line(raw, measured_here, options, code, said):
    with pytest.raises(ExpertlyError) as caught:
        measured_here(raw("olmoe"), **options)
    assert caught.value.code == code
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "fp16"),
        ({"torch_dtype": "float32"}, "fp32"),
        ({"dtype": None}, "bf16"),
        ({"dtype": "float64"}, "bf16"),
        ({"model_type": "qwen3_vl_moe", "text_config": {"dtype": "float32"}}, "fp32"),
    ],
)
def test_the_dtype_is_the_configs_or_bf16(config, dtype):
    assert expected.said_dtype(config) == dtype


def test_a_prompt_is_no_longer_than_the_model_was_made_for(raw):
    shape = read_shape(raw("olmoe", max_position_embeddings=64), "a model")

    def prompt(dtype, asked, new):
        return expect(shape, {}, dtype=dtype, prompt=asked, new=new, free=1e9).prompt

    assert prompt("bf16", 100, 10) == 64 - 10 - steps.WARM_UP
    assert prompt("bf16", 20, 10) == 20
    assert prompt("float32", 20, 100) == 1


# --- Random weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_the_class_and_sizes_that_its_config_says(family, raw, monkeypatch):
    monkeypatch.setattr(random_model, "_BLOCK", 251)  # most tensors are filled in blocks
    config = raw(family)
    model = random_model.random_model(config, torch.float32)
    usual = build_model(random_model._config(config)).eval()
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert there == {name: tuple(tensor.shape) for name, tensor in usual.state_dict().items()}
    assert type(model) is type(usual) and not model.training
    for (name, ours), (_, theirs) in zip(model.named_buffers(), usual.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name  # rotary frequencies; selection biases of zeros
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.dim() < 2 or weight.std() > 0, name
    logits = model(input_ids=torch.arange(12)[None]).logits
    assert logits.isfinite().all()


def test_random_rows_differ_and_tied_weights_stay_tied(raw, monkeypatch):
    monkeypatch.setattr(random_model, "_BLOCK", 251)
    model = random_model.random_model(raw("qwen3", tie_word_embeddings=True), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = model.model.embed_tokens.weight.float()
    assert len(rows.unique(dim=0)) > 0.8 * len(rows)
    assert model.dtype == torch.bfloat16


def test_random_routers_send_tokens_to_many_experts(raw):
    config = raw("olmoe", num_experts=16, hidden_size=64, initializer_range=0.02)
    model = random_model.random_model(config, torch.float32)
    ids = torch.randint(300, (1, 64), generator=torch.Generator().manual_seed(1))
    chosen = []
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    model(input_ids=ids)
    assert len(chosen[0].unique()) > 12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_model_is_of_the_same_class_with_as_many_experts(family, raw):
    config = raw(family, num_hidden_layers=4)
    tiny = tiny_model(config, torch.float32, 3)
    assert type(tiny) is type(random_model.random_model(config, torch.float32))
    assert len(tiny.model.layers) == 3
    experts = [module for part, module in parted(tiny) if part == "experts"]
    assert all(module.num_experts == 8 for module in experts)
    assert len(experts) == {"qwen3": 0, "deepseek_v3": 2}.get(family, 3)


@pytest.mark.parametrize(("family", "stand_in"), [("olmoe", "Qwen3Moe"), ("qwen3", "Qwen3")])
def test_another_class_stands_in_where_its_own_refuses_tiny_widths(
    family, stand_in, raw, monkeypatch
):
    monkeypatch.setitem(random_model._WIDTHS, "vocab_size", 0)  # no model of that can be run
    monkeypatch.setattr(random_model, "_PLAIN", random_model._PLAIN[:-1])
    tiny = tiny_model(raw(family), torch.float32, 2)
    assert type(tiny).__name__ == f"{stand_in}ForCausalLM"
    assert len(tiny.model.layers) == 2


def test_a_family_that_transformers_lacks_is_refused_before_anything_is_built(raw):
    with pytest.raises(ExpertlyError) as caught:
        tiny_model({**raw("olmoe"), "model_type": "no_such_family"}, torch.float32, 2)
    assert caught.value.code == "E305"


# --- Where the time goes -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_in_one_part_and_no_part_in_another(family, raw):
    model = random_model.random_model(raw(family), torch.float32)
    found = list(parted(model))
    inside = [weight for _, module in found for weight in module.parameters()]
    assert len(inside) == len({id(weight) for weight in inside})
    loose = {id(weight) for weight in model.parameters()} - {id(weight) for weight in inside}
    names = [name for name, weight in model.named_parameters() if id(weight) in loose]
    assert not names, "these are timed as nobody's"
    expected = {"embeddings", "attention", "norms", "head"}
    expected |= {"dense layers"} if family == "qwen3" else {"router", "experts"}
    assert {part for part, _ in found} >= expected


def test_the_parts_and_the_rest_fill_a_step(raw, monkeypatch):
    ticks = iter(range(10**9))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: float(next(ticks)))
    model = random_model.random_model(raw("olmoe"), torch.float32)
    found = time_parts(model, prompt=4, new=3)
    modules = [part for part, _ in parted(model)]
    for step in found:
        # the clock goes one on whenever it is read: two times per module and step
        assert {part: modules.count(part) for part in set(modules)} == {
            part: seconds for part, seconds in step.items() if part != REST
        }
        assert sum(step.values()) == 2 * len(modules) + 1
    assert not any(module._forward_hooks for module in model.modules()), "a clock is left behind"


def test_as_many_steps_are_timed_as_were_asked_for(raw):
    model = random_model.random_model(raw("olmoe"), torch.float32)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    times = time_steps(model, prompt=6, new=5)
    assert len(times.decode) == 5 and len(times.prefill) == lengths.count(6) - 2
    assert all(seconds > 0 for seconds in (*times.prefill, *times.decode))
    assert set(lengths) == {1, 6}


def test_a_typical_step_is_of_the_fastest_quarter():
    slow, fast = {"a": 5.0, REST: 5.0}, {"a": 1.0, REST: 2.0}
    assert typical([slow, fast, slow, slow]) == fast
    assert typical([slow]) == slow
    assert typical([fast, {"a": 3.0, REST: 0.0}, *[slow] * 6]) == {"a": 2.0, REST: 1.0}


# --- The machine -------------------------------------------------------------------------------


def test_the_machine_reads_and_multiplies():
    found = machine.measure_machine(torch.float32)
    assert 1e7 < found.bandwidth < 1e13
    assert 1e6 < found.flops < 1e16
    assert found.threads == torch.get_num_threads()
    assert read_bandwidth() > 0


def test_of_two_measurements_the_best_figures_count():
    one = Machine(bandwidth=2.0, flops=3.0, free=4.0, threads=1)
    other = Machine(bandwidth=1.0, flops=5.0, free=9.0, threads=1)
    assert better(one, other) == Machine(bandwidth=2.0, flops=5.0, free=4.0, threads=1)


def test_resident_memory_grows_with_what_is_touched():
    before = resident_memory()
    held = torch.ones(2**24)
    assert resident_memory() - before == pytest.approx(held.nbytes, rel=0.1)


def test_without_proc_the_most_memory_there_ever_was_is_told(monkeypatch, tmp_path):
    now = resident_memory()
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    most = resident_memory()
    assert most >= 0.9 * now
    monkeypatch.setattr(machine.sys, "platform", "darwin")  # which counts bytes, not kB
    assert resident_memory() == pytest.approx(most / 1024, rel=0.1)
    assert free_memory() > 2**20


@pytest.mark.parametrize(
    ("files", "free"),
    [
        pytest.param({}, 8_000 * 1024, id="no container"),
        pytest.param({"max": "max", "current": "5"}, 8_000 * 1024, id="no limit"),
        pytest.param({"max": "9000", "current": "3000", "stat": ""}, 6_000, id="a limit"),
        pytest.param(
            {"max": "9000", "current": "3000", "stat": "anon 5\ninactive_file 500"},
            6_500,
            id="a cache that goes",
        ),
        pytest.param({"max": "9000", "current": "9999", "stat": ""}, 0, id="nothing left"),
    ],
)
def test_free_memory_is_the_machines_or_the_containers(files, free, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    8000 kB\n\nHuge: x\n")
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert free_memory() == free


# --- Telling -----------------------------------------------------------------------------------


def _phase(*gaps, best=2.0, median=1.0):
    parts = [
        measured.Part(
            name=name, roofline=0.001, overhead=0.0, predicted=0.001, measured=0.001 + gap, gap=gap
        )
        for name, gap in gaps
    ]
    return measured.Phase(
        predicted=4.0,
        best=best,
        median=median,
        error=100.0,
        roofline=5.0,
        overhead=0.001,
        parts=tuple(parts),
        rates={},
    )


def test_the_gap_is_blamed_on_the_slowest_parts():
    found = _phase(("norms", 0.001), ("experts", 0.006), ("head", -0.5), ("router", 0.003))
    assert blame(found) == "experts 60%, router 30%, norms 10%"
    assert blame(_phase(("head", -1.0))) == "no part is slower than predicted"


def test_a_busy_machine_is_told_of():
    quiet, loud = _phase(best=1.1), _phase(best=3.0)
    assert busy(loud) == 3.0
    runs = [measured.Run(experts=None, decode=each, prefill=quiet) for each in (quiet, loud)]
    assert not any("busy" in note for note in measure._notes(True, {}, (runs[0],)))
    assert [note for note in measure._notes(True, {}, tuple(runs))][-1].endswith("3.0x the best")


def test_errors_are_in_percent_of_what_was_measured():
    assert error(150.0, 100.0) == pytest.approx(50)
    assert error(50.0, 100.0) == pytest.approx(-50)
    assert error(1.0, 0.0) == 0.0


# --- Memory ------------------------------------------------------------------------------------

_GROWTH = """
import json, os, sys
from pathlib import Path
from expertly.bench import doctor, machine
from expertly.bench.measure import measure
from expertly.plan.reading import read_shape
machine._WORKING_SET, doctor._SIZE = 2**22, 64

def grown(target):
    config = json.loads((target / "config.json" if target.is_dir() else target).read_text())
    found = measure(target, config, read_shape(config, "m"), prompt=4, new=2, dtype="bf16")
    memory = found.memory
    print(json.dumps([found.opened, memory.predicted, memory.measured]), flush=True)

# each in a process of its own, but the imports, which take longest, once
for target in sys.argv[1:]:
    child = os.fork()
    if not child:
        grown(Path(target))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


# what libraries keep besides, some tens of MB, is the same for any model: little beside gigabytes;
# a model that is held twice is 100 % off
def test_memory_grows_by_the_weights(raw, tmp_path):
    config = raw(
        "olmoe",
        hidden_size=512,
        moe_intermediate_size=512,
        num_experts=32,
        num_hidden_layers=4,
        vocab_size=2000,
        initializer_range=0.02,
    )
    bare, folder = tmp_path / "config.json", tmp_path / "model"
    bare.write_text(json.dumps(config))
    random_model.random_model(config, torch.bfloat16).save_pretrained(folder)
    command = [sys.executable, "-c", _GROWTH, bare, folder]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    shape = read_shape(config, "m")
    bytes_by_part = weights(shape, precision(shape, "bf16")).values()
    for line, opened, within in zip(said, (False, True), (0.2, 0.4), strict=True):
        was_opened, predicted, grown = json.loads(line)
        assert was_opened == opened
        assert predicted == sum(held.resident for held in bytes_by_part)
        assert 1.9e8 < predicted < 2.5e8
        assert math.isclose(grown, predicted, rel_tol=within), (opened, grown)
