"""Who runs in decode_cpu.py, with which settings, and what a step of each must read."""

from pathlib import Path
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """Bits a number takes: of most weights, of the head, of keys and values."""

    body: float
    head: float
    cache: float = 16


class Variant(NamedTuple):
    """How a contender is loaded, and how a round of it is run."""

    load: dict[str, Any]
    setting: dict[str, Any]

    def __str__(self) -> str:
        said = {**self.load, **self.setting}
        said = {key: value for key, value in said.items() if key not in ("folder", "file")}
        return " ".join(f"{key}={value}" for key, value in said.items()) or "only one"


class Contender(NamedTuple):
    """An engine at some bits; all pairs of a load and a setting are tried.

    environment: below --peers, unless a load names another; "": this one.
    """

    name: str
    bits: int
    stored: Stored
    environment: str
    worker: str
    loads: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    ours: bool = False


def contenders(work: Path, compiled: bool) -> list[Contender]:
    """Everybody, ours first; the model's files are in work. compiled: transformers so, too."""
    folder = str(work / "hf")
    return [
        *(_ours(folder, bits) for bits in (4, 8, 16)),
        *(_transformers(folder, dtype, compiled) for dtype in ("bfloat16", "float32")),
        *_gguf(str(work)),
        *_mistral(folder),
        _vllm(folder),
    ]


def active_bytes(config: dict[str, Any], stored: Stored, context: int) -> float:
    """Bytes that a decode step must read: matrices it uses, keys and values of the context."""
    dim, layers = config["hidden_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or dim // config["num_attention_heads"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * dim * head_dim * (heads + kv_heads)
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = 3 * config["num_experts_per_tok"] * dim * width
    router = 16 * config["num_experts"] * dim  # in bits; nobody stores it in fewer
    body = layers * ((attention + experts) * stored.body + router)
    cache = 2 * layers * kv_heads * head_dim * context * stored.cache
    return (body + config["vocab_size"] * dim * stored.head + cache) / 8


def _ours(folder: str, bits: int) -> Contender:
    stored = {4: Stored(4.5, 8.5), 8: Stored(8.5, 8.5), 16: Stored(16, 16)}[bits]
    load = {"folder": folder, "bits": bits}
    return Contender(f"expertly {bits} bits", bits, stored, "", "ours.py", [load], [{}], ours=True)


def _transformers(folder: str, dtype: str, compiled: bool) -> Contender:
    """Prefill never by batched_mm, which copies the weights of every token's experts."""
    bits = 16 if dtype == "bfloat16" else 32
    settings: list[dict[str, Any]] = [
        {"prefill": "eager", "decode": "eager"},
        {"prefill": "grouped_mm", "decode": "grouped_mm"},
        {"prefill": "grouped_mm", "decode": "batched_mm"},
    ]
    if compiled:
        settings += [{**each, "compiled": True} for each in settings[1:]]
    load = {"folder": folder, "dtype": dtype}
    stored = Stored(bits, bits, bits)
    return Contender(f"transformers {dtype}", 16, stored, "", "hf.py", [load], settings)


def _gguf(folder: str) -> list[Contender]:
    files = {"q4_0": (4, Stored(4.5, 6.5625)), "q8_0": (8, Stored(8.5, 8.5)), "bf16": (16, None)}
    found = []
    for file, (bits, stored) in files.items():
        stored = stored or Stored(16, 16)
        base = {"folder": folder, "file": f"{file}.gguf"}
        builds = [{**base, "environment": build} for build in ("llama", "llama-amx")]
        flash = [{"flash": True}, {"flash": False}]
        loads = [{**load, "repack": True} for load in builds]
        name = f"llama.cpp {file.upper()}"
        found.append(Contender(name, bits, stored, "llama", "llamacpp.py", loads, flash))
        loads = [{**base, "repack": repack} for repack in (True, False)]
        fused = [{**one, "fused": each} for one in flash for each in (True, False)]
        name = f"ik_llama.cpp {file.upper()}"
        found.append(Contender(name, bits, stored, "ik", "ikllama.py", loads, fused))
    return found


def _mistral(folder: str) -> list[Contender]:
    kinds = {"q4_0": (4, Stored(4.5, 4.5)), "q8_0": (8, Stored(8.5, 8.5))}
    return [
        Contender(
            f"mistral.rs {kind}",
            bits,
            stored,
            "mistralrs",
            "mistral_rs.py",
            [{"folder": folder, "isq": kind}],
            [{}],
        )
        for kind, (bits, stored) in kinds.items()
    ]


def _vllm(folder: str) -> Contender:
    load = {"folder": folder}
    return Contender("vLLM bf16", 16, Stored(16, 16), "vllm", "vllm_model.py", [load], [{}])
