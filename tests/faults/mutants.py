"""Mutants of a model folder: its weights in shards, its config.json. trials.py judges them.

A mutant is a function of its number: the same everywhere, so a number is all that is passed around.
"""

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """What is written over a folder's files, and a word for what was done."""

    kind: str
    files: dict[str, bytes]


# --- Weights -----------------------------------------------------------------------------------


def weight_mutant(folder: Path, other: Path, number: int) -> Mutant:
    """Mutant `number` of a folder's weights; `other` holds another save of the same model."""
    rng = random.Random(f"weights-{number}")
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    name = rng.choice(sorted(files))
    kind = rng.choice(sorted(_WEIGHTS))
    if kind in ("swapped shards", "another save's shard"):
        return Mutant(kind, _shards(kind, files, other, rng))
    return Mutant(kind, {name: _WEIGHTS[kind](files[name], rng)})


def _parts(data: bytes) -> tuple[int, bytes]:
    """Where the data begin, and the header's JSON."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return end, data[8:end]


def _with_header(data: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data[_parts(data)[0] :]


def _flip(data: bytes, rng: random.Random, start: int, end: int) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _run(data: bytes, rng: random.Random, made: Callable[[int], bytes]) -> bytes:
    start, length = rng.randrange(len(data)), rng.randint(1, 400)
    run = made(min(length, len(data) - start))
    return data[:start] + run + data[start + len(run) :]


def _length_lie(data: bytes, rng: random.Random) -> bytes:
    true = struct.unpack("<Q", data[:8])[0]
    lies = [0, 1, true - 1, true + 1, true + rng.randint(2, 5000), len(data), 2**40, 2**63]
    return struct.pack("<Q", rng.choice([*lies, 2**64 - 1, rng.getrandbits(64)])) + data[8:]


def _header_edit(data: bytes, rng: random.Random) -> bytes:
    header = json.loads(_parts(data)[1])
    tensors = sorted(set(header) - {"__metadata__"})
    name, other = rng.choice(tensors), rng.choice(tensors)
    if rng.random() < 0.4:
        _lie(header[name], rng)
    else:
        _move(header, name, other, rng)
    return _with_header(data, json.dumps(header).encode())


def _lie(entry: dict[str, Any], rng: random.Random) -> None:
    match rng.randrange(3):
        case 0:
            entry["dtype"] = rng.choice(["F32", "I32", "U32", "BF16", "F16", "F64", "X"])
        case 1:
            entry["shape"] = rng.choice([entry["shape"][::-1], [], [-1], [2**63], [1.5]])
        case _:
            entry["data_offsets"] = [
                at + rng.choice([-8, 4, 2**40]) for at in entry["data_offsets"]
            ]


def _move(header: dict[str, Any], name: str, other: str, rng: random.Random) -> None:
    match rng.randrange(5):
        case 0:  # two tensors of one shape, each in the other's place
            shape = header[name]["shape"]
            like = [each for each in sorted(header) if header[each].get("shape") == shape]
            one, two = header[name], header[rng.choice(like)]
            one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
        case 1:
            header[name + rng.choice(["x", ".weight", "\0"])] = header.pop(name)
        case 2:
            del header[name]
        case 3:
            header[name], header[other] = header[other], header[name]
        case _:
            header["__metadata__"] = rng.choice([{}, 3, {"format": "tf"}, {"format": 3}])


def _shards(kind: str, files: dict[str, bytes], other: Path, rng: random.Random) -> dict:
    one, two = rng.sample(sorted(files), 2)
    if kind == "swapped shards":
        return {one: files[two], two: files[one]}
    return {one: (other / one).read_bytes()}


_WEIGHTS: dict[str, Any] = {
    "bit of data": lambda data, rng: _flip(data, rng, _parts(data)[0], len(data)),
    "bit of header": lambda data, rng: _flip(data, rng, 0, _parts(data)[0]),
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "extended": lambda data, rng: data + rng.randbytes(rng.randint(1, 400)),
    "zeros": lambda data, rng: _run(data, rng, bytes),
    "noise": lambda data, rng: _run(data, rng, rng.randbytes),
    "length lie": _length_lie,
    "header edit": _header_edit,
    "swapped shards": None,
    "another save's shard": None,
}

# --- config.json -------------------------------------------------------------------------------

_NUMBERS = (0, 1, -1, 3, 2**16, 2**31, 2**40, 2**62, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e300)
_ODD = (
    None,
    True,
    False,
    "",
    "x",
    "8",
    "../x",
    [],
    {},
    [3],
    {"x": 3},
    ["x"] * 3,
    math.nan,
    math.inf,
)
_WORDS = (
    "silu",
    "relu",
    "nope",
    "float16",
    "int8",
    "llama",
    "gpt2",
    "bert",
    "mixtral",
    "qwen3_moe",
)
_DEEP = "nested deeply"  # stands for brackets, which Python cannot build as deep as it can read
_EXTRA: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
    ("_attn_implementation", "evil/kernel"),
    ("_attn_implementation_internal", "evil/kernel:f"),
    ("attn_implementation", "nope"),
    ("experts_implementation", "evil/kernel"),
    ("_experts_implementation_internal", "evil/kernel"),
    ("trust_remote_code", True),
    ("custom_generate", "evil"),
    ("transformers_weights", "../evil.safetensors"),
    ("per_layer_config", {"0": {"hidden_size": 8}}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("num_labels", 2**62),
    ("id2label", {"0": "x"}),
    ("layer_types", ["full_attention"]),
    ("layer_types", ["evil", "evil"]),
    ("to_dict", 3),
    ("from_pretrained", "x"),
    ("__class__", "x"),
    ("__dict__", {}),
    ("sub_configs", {"x": "y"}),
    ("head_dim", 2**50),
    ("rope_scaling", {"rope_type": "yarn", "factor": -3}),
    ("rope_theta", -1.0),
    ("mlp_only_layers", [0, 1, 99]),
    ("base_model_tp_plan", {"x": 3}),
    ("is_encoder_decoder", True),
    ("output_attentions", True),
    ("use_return_dict", False),
)


def config_mutant(config: dict[str, Any], number: int) -> Mutant:
    """Mutant `number` of a config.json."""
    rng = random.Random(f"config-{number}")
    if rng.random() < 0.1:
        return Mutant("text", {"config.json": _text_mutant(json.dumps(config), rng)})
    changed = copy.deepcopy(config)
    kinds = [_change(changed, rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    depth = rng.choice([10, 300, 900, 100_000])
    text = json.dumps(changed).replace(f'"{_DEEP}"', "[" * depth + "1" + "]" * depth)
    return Mutant(kinds[0], {"config.json": text.encode()})


def _change(config: dict[str, Any], rng: random.Random) -> str:
    """Change one key, in place; the word for how."""
    places = [(config, key) for key in config]
    places += [(v, key) for v in config.values() if isinstance(v, dict) for key in v]
    place, key = rng.choice(places)
    value = place[key]
    kind = rng.choice(["odd", "number", "near", "missing", "extra", "word", "deep", "moved"])
    if kind == "extra":
        name, said = rng.choice(_EXTRA)
        config[name] = said
    elif kind == "missing":
        del place[key]
    elif kind == "moved":
        plain = [name for name in sorted(config) if not isinstance(config[name], dict | list)]
        place[key] = config[rng.choice(plain)]
    elif kind == "deep":
        place[key] = _DEEP
    elif kind == "near" and isinstance(value, int | float):
        place[key] = rng.choice([-value, value + 1, value - 1, value * 2, value / 2, str(value)])
    else:
        place[key] = rng.choice({"number": _NUMBERS, "word": _WORDS}.get(kind, _ODD))
    return kind


def _text_mutant(text: str, rng: random.Random) -> bytes:
    """The file's bytes, damaged."""
    data = text.encode()
    match rng.randrange(5):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            return _flip(data, rng, 0, len(data))
        case 2:
            return _run(data, rng, rng.randbytes)
        case 3:
            return b"[" * 10 ** rng.randint(1, 5)
        case _:  # a key twice; a number of 5,000 digits
            return data[:-1] + rng.choice([b', "hidden_size": 8}', b', "x": ' + b"9" * 5000 + b"}"])
