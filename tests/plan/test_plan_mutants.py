"""Thousands of damaged configs: each is planned in full, or refused in one line; none hangs."""

import copy
import inspect
import json
import math
import random
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from mutants import config_mutant

from expertly.cli.plan import plan as verb
from expertly.cli.plan_page import page
from expertly.cli.plan_question import question_of, shape_of_target
from expertly.errors import ExpertlyError
from expertly.family_table import FAMILIES
from expertly.plan.job import plan
from expertly.plan.known import known
from expertly.plan.makes import MAKES
from expertly.plan.reading import has_formulas
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
FORMULAS = (*MAKES, "switch_transformers")
# families without formulas, and what transformers has no language model of
UNKNOWN = ("phi3", "jamba", "falcon", "bert", "clip", "x")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

# --- Mutants: a function of their number --------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**20, 2**31, 2**53, 2**63, 10**30)
NUMBERS += (0.0, 0.5, -2.5, 1e-300, 1e300, math.nan, math.inf, -math.inf)
OTHERS = (None, True, False, "", "8", "x" * 5000, [], [1], [[]], {}, {"a": {"b": [1]}})
WINDOWS = (0, -1, 1, 3, 2**40, 2**63, 4096.0, "4096", [4096], True, None)
KINDS = ("full_attention", "sliding_attention", "linear_attention", "mamba", "", 3, None, [])
QUANTISED = (
    {"quant_method": "fp8"},
    {"quant_method": "mxfp4"},
    {"quant_method": ["fp8"]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"bits": -3},
    {"bits": True},
    {"bits": 10**30},
    {"bits": "4"},
    {},
    "fp8",
    8,
    [],
)
DTYPES = ("float32", "torch.float16", "float8", "bfloat16 ", "auto", 16, True, {}, [], "", None)
LAYER_LISTS = ("layer_types", "mlp_only_layers", "mlp_layer_types", "moe_layer_start_index")
COMMON = (
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "layer_types",
    "tie_word_embeddings",
    "num_nextn_predict_layers",
    "head_dim",
)
SWITCH = (
    "num_decoder_layers",
    "num_sparse_encoder_layers",
    "num_sparse_decoder_layers",
    "relative_attention_num_buckets",
    "router_bias",
)


def keys_of(config):
    """The keys that the formulas of a config's family read, there or not."""
    kind = config.get("model_type")
    if kind == "switch_transformers":
        return SWITCH
    make, row = (table.get(str(kind)) for table in (MAKES, FAMILIES))
    said = [*make.defaults, *(v for v in vars(make).values() if isinstance(v, str))] if make else []
    if row:
        said += [*row.layers.values(), *row.options.values(), *row.words]
        said += filter(None, (row.shared_experts, row.shared_width))
    return (*COMMON, *said)


def any_value(config, key, rng):
    config[key] = rng.choice(NUMBERS + OTHERS)


def another_number(config, key, rng):
    value = config[key]
    if isinstance(value, int):
        config[key] = rng.choice([value + 1, value * 2, -value, value // 2, float(value)])


def gone(config, key, rng):
    config.pop(key)


def swapped(config, key, rng):
    other = rng.choice(sorted(config))
    config[key], config[other] = config[other], config[key]


def too_many_chosen(config, key, rng):
    for name in config:
        if name in ("num_experts_per_tok", "moe_k", "topk_group"):
            config[name] = rng.choice([1, 9, 65, 129, 1000, 2**20])


def heads(config, key, rng):
    config["num_attention_heads"] = rng.choice([1, 3, 7, 32, 33, 2**16])
    config["num_key_value_heads"] = rng.choice([1, 2, 5, 8, 64])


def layers(config, key, rng):
    name = "num_layers" if "num_layers" in config else "num_hidden_layers"
    config[name] = rng.choice([1, 2, 5, 500, 9_999, 10_000, 10_001])


def layer_lists(config, key, rng):
    length = rng.choice([0, 1, 5, 24, 48, 200])
    config[rng.choice(LAYER_LISTS)] = [
        rng.choice([*KINDS, "sparse", "dense", 0, -1, 9]) for _ in range(length)
    ]


def kinds(config, key, rng):
    length = config.get("num_hidden_layers", 4)
    config["layer_types"] = rng.choices(KINDS[:3], k=min(length if type(length) is int else 3, 99))


def window(config, key, rng):
    config["sliding_window"] = rng.choice(WINDOWS)
    config["use_sliding_window"] = rng.choice([True, True, False, "no"])


def stored(config, key, rng):
    config["quantization_config"] = rng.choice(QUANTISED)
    config[rng.choice(["dtype", "torch_dtype"])] = rng.choice(DTYPES)


def another_family(config, key, rng):
    config["model_type"] = rng.choice(FORMULAS)


def one_more(config, key, rng):
    config[rng.choice(keys_of(config))] = rng.choice(NUMBERS + OTHERS)


def harmless(config, key, rng):
    config[rng.choice(["architectures", "use_cache", "pad_token_id"])] = rng.choice(OTHERS)
    config["vocab_size"] = rng.choice([1, 100, 32_000])


CHANGES = (
    any_value,
    another_number,
    gone,
    swapped,
    too_many_chosen,
    heads,
    layers,
    layer_lists,
    kinds,
    window,
    stored,
    another_family,
    one_more,
    one_more,
    harmless,
)


def mutant(number):
    """The bytes of a config.json: of a built-in model, changed once or more."""
    rng = random.Random(f"plan-{number}")
    config = copy.deepcopy(known()[rng.choice(sorted(known()))])
    if rng.random() < 0.2:
        return config_mutant(config, number).files["config.json"]
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        rng.choice(CHANGES)(config, rng.choice(sorted(config) or ["x"]), rng)
        config = config or {"model_type": "llama"}
    return json.dumps(config).encode()


def unknown_mutant(number):
    """As mutant, of a small model of a family without formulas; the first of each is whole."""
    rng = random.Random(f"unknown-{number}")
    config = {**SMALL, "model_type": UNKNOWN[number % len(UNKNOWN)], "pad_token_id": None}
    if number >= len(UNKNOWN):
        changes = [change for change in CHANGES if change not in (another_family, layers)]
        rng.choice(changes)(config, rng.choice(sorted(SMALL)), rng)
    return json.dumps(config).encode()


def is_quick(data):
    """Whether no torch is needed: a family with formulas, or no config at all."""
    try:
        return has_formulas(json.loads(data))
    except (ValueError, RecursionError, KeyError, TypeError):
        return True


# --- What becomes of them -----------------------------------------------------------------------


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


def test_every_built_in_model_is_answered(tmp_path, limited):
    configs = enumerate(json.dumps(known()[name]).encode() for name in sorted(known()))
    assert outcomes(configs, tmp_path / "config.json") == {"answer": len(known())}


def test_2000_damaged_configs_are_planned_or_one_line(tmp_path, limited):
    made = ((number, mutant(number)) for number in range(10_000))
    quick = [(number, data) for number, data in made if is_quick(data)][:2000]
    assert len(quick) == 2000
    said = outcomes(quick, tmp_path / "config.json")
    assert said["answer"] > 400
    assert said.total() - said["answer"] > 400
    assert set(said) <= {"answer", "E208", "E301", "E305", "E306"}


def test_whatever_a_key_says_it_is_counted_or_one_line(tmp_path):
    """Of a model of every family, each key that formulas read, with every odd value."""
    families = {config["model_type"]: config for config in known().values()}
    assert set(families) == set(FORMULAS) - {"olmo2", "granite"}, "which are made as others are"
    said = Counter()
    for config in families.values():
        for key in {*config, *keys_of(config)} - {"model_type"}:
            for value in NUMBERS + OTHERS:
                changed = {"use_sliding_window": True, **config, key: value}
                said[counted(changed, tmp_path / "config.json")] += 1
    assert min(said["shape"], said["E305"]) > 4000
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
