"""Packed weights measured: random ones that are never whole, their rates, and the prediction."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from expertly.bench import doctor, machine, packed_model, random_model, sweep
from expertly.bench import measure as measure_module
from expertly.bench import packed_rates as rates_module
from expertly.bench.expected import expect, packing_of, weight_bytes
from expertly.bench.measure import measure
from expertly.bench.measured import tables
from expertly.bench.packed_model import tiny_maker
from expertly.bench.packed_rates import Tokens, attention_rate, faster, packed_rates
from expertly.bench.predicted import as_device
from expertly.bench.random_model import tiny_model
from expertly.bench.steps import REST, parted, time_steps
from expertly.bench.sweep import Sweep, swept
from expertly.errors import ExpertlyError
from expertly.kernels.packed_linear import PackedModule
from expertly.models.packing import Precision, experts_modules, is_packed
from expertly.plan.hardware import device_of, flops_at
from expertly.plan.precision import symmetric
from expertly.plan.reading import read_shape
from expertly.plan.speed import decode, prefill

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "gpt_oss", "qwen3")
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Seconds, not minutes."""
    monkeypatch.setattr(machine, "_WORKING_SET", 2**22)
    monkeypatch.setattr(sweep, "_WORDS", 2**16)
    monkeypatch.setattr(doctor, "_SIZE", 64)
    monkeypatch.setattr(random_model, "_BLOCK", 4093)


@pytest.fixture
def raw(raw):
    """raw(family, **sizes) -> a config.json as a dict, of widths that groups divide."""
    return lambda family, **sizes: raw(family, **{**SIZES, **sizes})


@pytest.fixture
def measured_here(tmp_path):
    def run(config, target=None, **options):
        shape = read_shape(config, "a model")
        options = {"prompt": 16, "new": 4, "bits": "4", "dtype": "bf16", **options}
        return measure(target or tmp_path / "none.json", config, shape, **options)

    return run


def made(config, bits=4, **options):
    precision = Precision(bits, 0 if bits == 16 else 32)
    return packed_model.packed_model(config, torch.bfloat16, precision=precision, **options)


# --- What --bits says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "packing"),
    [("4", (4, 32)), ("8", (8, 32)), ("16", (16, 0)), ("4g64", (4, 64)), ("8g128", (8, 128))],
)
def test_bits_and_groups_that_the_engine_packs(bits, packing):
    assert packing_of(bits) == packing
    assert packing_of(None) is None


@pytest.mark.parametrize("bits", ["3", "2.5", "4g16", "16g32", "4,attention=8", "four", "44"])
def test_other_bits_are_one_line_before_anything_is_planned(bits, cli):
    code, out, err = cli("plan", "olmoe-1b-7b", "--measure", "--bits", bits)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "E208" in err and "4, 8 or 16" in err and "4g64" in err


def test_weights_that_cannot_be_packed_are_told_before_anything_is_timed(raw, measured_here):
    said = []
    with pytest.raises(ExpertlyError) as caught:
        measured_here(
            raw("olmoe", intermediate_size=48, moe_intermediate_size=48), tell=said.append
        )
    assert caught.value.code == "E202"
    assert "48" in str(caught.value) and not said


# --- Formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["4", "8", "16", "4g64"])
def test_packed_bytes_are_predicted_to_the_byte(family, bits, raw):
    """Where rows are a multiple of 16; but for biases, which are in float32."""
    config = raw(family, vocab_size=320)
    expected = _expected(config, packing_of(bits))
    model = packed_model.packed_model(config, torch.bfloat16, precision=expected.packing)
    there = sum(t.nbytes for t in model.state_dict().values())
    predicted = weight_bytes(expected.shape, expected.precision)
    within = 0.08 if family in ("gpt_oss", "qwen2_moe") else 0
    assert there == pytest.approx(predicted, rel=within)


def _expected(config, packing):
    shape = read_shape(config, "a model")
    options = {"dtype": "bf16", "prompt": 8, "new": 4, "free": 1e12}
    return expect(shape, config, packing=packing, **options)


def test_the_head_has_eight_bits_and_routers_stay(raw):
    formats = _expected(raw("olmoe"), Precision(4, 32)).precision
    assert formats["experts"] == formats["attention"] == symmetric(4, 32)
    assert formats["head"] == symmetric(8, 32)
    assert formats["router"].name == formats["embeddings"].name == "bf16"
    assert symmetric(4, 32).bits + symmetric(4, 32).overhead == 4.5
    assert symmetric(16, 0).name == "bf16"


def test_tied_embeddings_get_a_head_beside_them(raw):
    config = raw("qwen3", tie_word_embeddings=True)
    expected = _expected(config, Precision(4, 32))
    assert not expected.shape.tied
    model = made(config)
    assert type(model.lm_head).__name__ == "PackedLinear"
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


# --- Random packed weights ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_random_packed_model_answers_in_finite_numbers(family, bits, raw):
    model = made(raw(family), bits)
    assert is_packed(model) and not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.inference_mode():
        assert model(input_ids=torch.arange(12)[None]).logits.isfinite().all()


def test_no_more_than_a_matrix_is_ever_in_high_precision(raw, monkeypatch):
    """Counted whenever a matrix is drawn: what is alive of the model, by part."""
    config = raw("olmoe", num_hidden_layers=3)
    alive, own = [], random_model.Numbers.matrix
    models = []
    meta_model = packed_model.meta_model

    def watched(*arguments):
        models.append(meta_model(*arguments))
        return models[-1]

    def matrix(self, rows, width):
        parts = parted(models[-1])
        high = {
            part
            for part, module in parts
            for weight in module.parameters()
            if weight.dim() > 1 and not weight.is_meta
        }
        alive.append((high, rows * width))
        return own(self, rows, width)

    monkeypatch.setattr(packed_model, "meta_model", watched)
    monkeypatch.setattr(random_model.Numbers, "matrix", matrix)
    made(config)
    assert alive
    assert all(high == {"embeddings", "router"} for high, _ in alive)
    assert max(size for _, size in alive) <= 320 * 64, "no stack at once"


def test_every_packed_part_is_found(raw):
    model = made(raw("qwen2_moe"))
    parts = {part for part, _ in parted(model)}
    assert parts >= {"embeddings", "attention", "norms", "router", "experts", "head"}
    inside = {id(m) for _, module in parted(model) for m in module.modules()}
    packed = [m for m in model.modules() if isinstance(m, PackedModule)]
    assert packed and all(id(module) in inside for module in packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_model_is_packed_at_the_same_bits(family, raw):
    for packing in (Precision(4, 128), Precision(8, 32), Precision(16, 0)):
        tiny = tiny_model(raw(family), torch.bfloat16, 2, tiny_maker(packing))
        assert len(tiny.model.layers) == 2
        bits = {each.packed.down.bits for each in experts_modules(tiny).values()}
        assert bits == (set() if family == "qwen3" else {packing.bits})


# --- Rates and overhead ------------------------------------------------------------------------


def test_rates_are_of_every_packed_part(raw, monkeypatch):
    """With a clock of which a byte takes a second, and whatever is tiny nothing."""
    config = raw("olmoe", **dict.fromkeys(SIZES, 256), vocab_size=320)
    formats, tokens = _expected(config, Precision(4, 32)).precision, Tokens(64, 8, 2)
    model, tiny = made(config), tiny_model(config, torch.bfloat16, 2, tiny_maker(Precision(4, 32)))

    def seconds(calls, sweep=None, size=0.0):
        return 0.0 if sweep else sum(call.bytes for call in calls)

    monkeypatch.setattr(rates_module, "_seconds", seconds)
    rates = packed_rates(model, tiny, tokens, formats, Sweep())
    # all experts are met, 64 tokens take 2 each; a weight has 4.5 or, in the head, 8.5 bits
    assert rates == {
        "int4g32 attention": pytest.approx(2 * 64 * 8 / 4.5),
        "int4g32 experts": pytest.approx(2 * 64 * 2 / 8 * 8 / 4.5, rel=1e-3),
        "int8g32 head": pytest.approx(2 * 8 * 8 / 8.5),
    }


def test_a_call_that_takes_as_long_on_nothing_has_no_rate(raw, monkeypatch):
    config = raw("olmoe")
    formats = _expected(config, Precision(4, 32)).precision
    model, tiny = made(config), tiny_model(config, torch.bfloat16, 2, tiny_maker(Precision(4, 32)))
    monkeypatch.setattr(rates_module, "_seconds", lambda calls, *sweep: 2.0 * len(calls))
    assert packed_rates(model, tiny, Tokens(64, 64, 2), formats, Sweep()) == {}


def test_attention_and_packed_parts_take_time(raw):
    config = raw("olmoe", **dict.fromkeys(SIZES, 256))
    model, layers = made(config), _expected(config, Precision(4, 32)).shape.layers
    assert attention_rate(model, layers[0], 32) > 0
    for calls in rates_module._calls(model, Tokens(64, 64, 2)).values():
        assert rates_module._seconds(calls, Sweep(), 2**16) > 0


def test_of_two_measurements_the_best_rates_count():
    assert faster({"a": 1.0, "b": 2.0}, {"a": 3.0, "c": 4.0}) == {"a": 3.0, "b": 2.0, "c": 4.0}


def test_a_device_may_have_rates_by_format_and_part():
    device = replace(device_of("cpu"), flops={"bf16": 1.0, "int4": 2.0, "int4 experts": 3.0})
    assert flops_at(device, "int4", "experts") == 3
    assert flops_at(device, "int4", "attention") == flops_at(device, "int4") == 2
    assert flops_at(device, "int8", "experts") == 1


def test_a_sweep_reads_what_each_part_has_to_and_stops_the_clock(raw, monkeypatch):
    ticks, read = iter(range(10**6)), []
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: float(next(ticks)))

    def slowly(words):
        read.append(words.nbytes)
        for _ in range(100):
            next(ticks)

    monkeypatch.setattr(sweep, "read", slowly)
    clock, model = Sweep(), random_model.random_model(raw("olmoe"), torch.float32)
    with swept(model, clock, {"experts": 2 * 2**17, "norms": 0.0}):
        time_steps(model, prompt=4, new=1)
        calls = len(read) // 2
    assert set(read) == {2**16} and calls % 2 == 0, "2 layers, half of the bytes each, in pieces"
    assert not any(module._forward_pre_hooks for module in model.modules())
    before = clock()
    clock.read(2**17)
    assert clock() - before == 2.0, "readings of the clock alone"


# --- The whole way -----------------------------------------------------------------------------


def test_predictions_are_the_plans_own_at_the_kernels_rates(raw, measured_here):
    config = raw("olmoe")
    found = measured_here(config)
    assert (found.bits, found.group_size, found.opened) == (4, 32, False)
    (run,) = found.runs
    assert run.experts == "expertly"
    expected = _expected(config, Precision(4, 32))
    shape, formats = expected.shape, expected.precision
    one, eight, whole = run.decode, run.batched, run.prefill
    for phase, step in (
        (one, _decode(shape, formats, found, one, batch=1, context=18)),
        (eight, _decode(shape, formats, found, eight, batch=8, context=4)),
        (whole, _prefill(shape, formats, found, whole)),
    ):
        assert phase.predicted == pytest.approx(step.tokens_per_second)
        assert sum(part.predicted for part in phase.parts) == pytest.approx(step.seconds)
        assert phase.error == pytest.approx(100 * (phase.predicted / phase.best - 1))
        names = {part.name for part in phase.parts}
        assert names == {"embeddings", "attention", "norms", "router", "experts", "head", REST}
    assert "bf16 kv cache" in whole.rates and "bf16 kv cache" not in one.rates
    assert found.memory.predicted == weight_bytes(shape, formats)


def test_the_roofline_is_the_machines_alone(raw, measured_here, monkeypatch):
    monkeypatch.setattr(measure_module, "packed_rates", lambda *given: {"int4g32 experts": 1e6})
    found = measured_here(raw("olmoe"))
    expected = _expected(raw("olmoe"), Precision(4, 32))
    device = as_device(found.machine)
    assert device.flops == {"fp32": found.machine.flops, "bf16": found.machine.flops}
    step = decode(expected.shape, expected.precision, device, batch=1, context=18, overhead=0.0)
    phase = found.runs[0].decode
    assert phase.predicted == pytest.approx(
        _decode(
            expected.shape, expected.precision, found, phase, batch=1, context=18
        ).tokens_per_second
    )
    assert phase.roofline == pytest.approx(step.tokens_per_second)
    assert sum(part.roofline for part in phase.parts) == pytest.approx(step.seconds)
    assert any("kernels' own timings" in note for note in found.notes)


def _decode(shape, formats, found, phase, **options):
    device = as_device(found.machine, phase.rates)
    return decode(shape, formats, device, overhead=phase.overhead, **options)


def _prefill(shape, formats, found, phase):
    device = as_device(found.machine, phase.rates)
    return prefill(shape, formats, device, tokens=16, overhead=phase.overhead)


def test_a_packed_measurement_is_json_and_tables(raw, measured_here):
    found = measured_here(raw("mixtral"), bits="8g64", tell=lambda line: None)
    said = json.loads(json.dumps(asdict(found)))
    assert (said["bits"], said["group_size"]) == (8, 64)
    assert said["runs"][0]["batched"]["predicted"] > 0
    pages = tables(found)
    assert "packed to 8 bits in groups of 64" in pages[1].title
    assert [row[0] for row in pages[1].rows[2:]] == [
        f"{phase}, tokens/s, experts by expertly" for phase in ("decode", "decode of 8", "prefill")
    ]
    assert len(pages) == 2 + 3
    assert any(note.startswith("gap of decode of 8") for note in found.notes)
    for page in pages:
        assert len({len(row) for row in page.rows}) == 1


def test_a_folder_is_packed_while_it_opens(raw, measured_here, tmp_path):
    config, folder = raw("olmoe"), tmp_path / "model"
    random_model.random_model(config, torch.bfloat16).save_pretrained(folder)
    found = measured_here(config, folder)
    assert found.opened and found.bits == 4
    assert found.runs[0].batched.best > 0


def test_a_dense_model_is_packed_too(raw, measured_here):
    (run,) = measured_here(raw("qwen3")).runs
    assert run.experts is None and run.batched.best > 0


def test_without_bits_nothing_is_packed(raw, measured_here):
    found = measured_here(raw("olmoe"), bits=None)
    assert (found.bits, found.group_size) == (None, None)
    assert [run.batched for run in found.runs] == [None, None]
    assert not any("timings" in note for note in found.notes)
    assert not any(phase.rates for run in found.runs for _, phase in run.phases)
