"""Damaged configs, each a function of its number: of the built-in models, and of other families."""

import copy
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from mutants import config_mutant

from expertly.family_table import FAMILIES
from expertly.plan.known import known
from expertly.plan.makes import MAKES
from expertly.plan.reading import has_formulas

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


NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**20, 2**31, 2**53, 2**63, 10**30)
NUMBERS += (0.0, 0.5, -2.5, 1e-300, 1e300, math.nan, math.inf, -math.inf)
KINDS_OF_VALUES = (None, True, "", "8", [], [1], {}, 0, -1, 2**63, 0.5, math.nan, math.inf)
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
