"""A whole model on a CPU beside other engines: prefill, decode, memory, error.

Run: python benchmarks/decode_cpu.py --peers DIR --work DIR [--only NAME ..] [--rounds 5]
         [--threads 2] [--config CONFIG.json] [--json FILE]
Random weights of a config.json are written once to --work: a folder, and GGUF files by llama.cpp's
own tools. --peers holds an environment for each peer (peers/README.md). Every setting of a
contender is tried once; then its best for prefill and its best for decode run, each in a process of
its own that stays, in turn with all others: name few with --only where memory is short. One
sequence: a prompt of random tokens at once, then one token a step. Errors are those of the logits
at every position of the prompt, against transformers in fp32. A decode step reads at least the
weights it uses and the cache; GB/s and the roofline are of that. Ratios are medians over rounds of
ours at the same bits against theirs: above 1, we are faster.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from decode_contenders import Contender, Variant, active_bytes, contenders
from model_files import make_folder, make_gguf
from side_by_side import parser, ratio, read_bandwidth, shown, start, table, wanted, write_json
from wire import PeerError

PHASES = ("prefill", "decode")
HEAD = ("contender", "prefill tok/s", "ours is", "decode tok/s", "ours is", "GB/s", "of roofline")
MORE = ("peak GiB", "error", "top-1", "setting")


class Tried(NamedTuple):
    """What trying a contender's settings found: the best of each phase, errors of its logits."""

    best: dict[str, Variant]
    error: float | None
    top1: float | None


def main() -> None:
    given = arguments()
    config = json.loads(given.config.read_text())
    work = given.work / given.config.stem
    work.mkdir(parents=True, exist_ok=True)
    make_folder(config, work / "hf")
    if failed := make_gguf(given.peers, work / "hf", work):
        print(failed)
    rng = random.Random(0)
    tokens = [rng.randrange(config["vocab_size"]) for _ in range(given.prompt + given.new)]
    bench = Bench(given, work, tokens)
    asked = [each for each in contenders(work, given.compiled) if wanted(each.name, given.only)]
    bandwidth = read_bandwidth(given.threads)
    tried = {each.name: bench.tried(each) for each in asked}
    running = [each for each in asked if isinstance(tried[each.name], Tried)]
    rounds = bench.rounds(running, tried)
    bandwidth = max(bandwidth, read_bandwidth(given.threads))
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s, {given.threads} threads\n")
    rows = [row(each, running, tried, rounds, config, given, bandwidth) for each in running]
    print(table([*HEAD, *MORE], rows))
    for each in asked:
        if each not in running:
            print(f"* {each.name}: {tried[each.name]}")
    write_json(given.json, {"bandwidth": bandwidth, "tried": tried, "rounds": rounds})


def arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=5)
    made.add_argument("--work", type=Path, required=True, help="where the model's files are put")
    made.add_argument("--config", type=Path, default=Path("examples/olmoe-1.8b.json"))
    made.add_argument("--prompt", type=int, default=512)
    made.add_argument("--new", type=int, default=64)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--compiled", action="store_true", help="try torch.compile: many minutes")
    return made.parse_args()


class Bench:
    """The same prompt for everybody."""

    def __init__(self, given: argparse.Namespace, work: Path, tokens: list[int]):
        self.given, self.work, self.tokens = given, work, tokens

    def tried(self, contender: Contender) -> Tried | str:
        """Every setting once, and the logits; why it cannot run, if none could."""
        timed: list[tuple[Variant, dict[str, Any]]] = []
        why = "no setting"
        logits = self.work / "logits.npy"
        logits.unlink(missing_ok=True)
        for load in contender.loads:
            try:
                peer = self._start(contender, load)
            except PeerError as error:
                why = str(error)
                continue
            for setting in contender.settings:
                try:
                    timed.append((Variant(load, setting), self._round(peer, setting)))
                    if not logits.exists():
                        ids = self.tokens[: self.given.prompt]
                        peer.ask("save_logits", tokens=ids, setting=setting, to=str(logits))
                except PeerError as error:
                    why = str(error)
                    if peer.ended:
                        break
            peer.end()
        said = f"{len(timed)} settings tried" if timed else why
        print(f"{contender.name}: {said}", flush=True)
        if not timed:
            return why
        best = {phase: min(timed, key=lambda each: each[1][phase])[0] for phase in PHASES}
        return Tried(best, *self._errors(logits))

    def rounds(self, running: list[Contender], tried: dict[str, Any]) -> dict[str, list[dict]]:
        """Seconds of both phases and peak memory, for every contender in every round."""
        found: dict[str, list[dict]] = {each.name: [] for each in running}
        peers: dict[str, Any] = {}
        for number in range(self.given.rounds):
            for contender in running:
                best = tried[contender.name].best
                try:
                    found[contender.name].append(self._visit(peers, contender, best))
                except PeerError as error:
                    print(f"{contender.name}: round {number}: {error}", flush=True)
            print(f"round {number + 1} of {self.given.rounds}", flush=True)
        for peer in peers.values():
            peer.end()
        return found

    def _visit(
        self, peers: dict[str, Any], contender: Contender, best: dict[str, Variant]
    ) -> dict[str, Any]:
        """One round of the best setting of each phase; the same round where that is one."""
        answers: dict[str, Any] = {}
        for phase in PHASES:
            if phase == "decode" and best["decode"] == best["prefill"]:
                answers[phase] = answers["prefill"]
                continue
            name = f"{contender.name} {best[phase].load}"
            if name not in peers:
                peers[name] = self._start(contender, best[phase].load)
            answers[phase] = self._round(peers[name], best[phase].setting)
        memory = max(answer["memory"] for answer in answers.values())
        return {"memory": memory, **{phase: answers[phase][phase] for phase in PHASES}}

    def _start(self, contender: Contender, load: dict[str, Any]) -> Any:
        options = {key: value for key, value in load.items() if key != "environment"}
        where = load.get("environment", contender.environment)
        return start(self.given.peers, where, contender.worker, self.given.threads, **options)

    def _round(self, peer: Any, setting: dict[str, Any]) -> dict[str, Any]:
        """One round after one that counts for nothing: buffers, pages, and code compiled late."""
        prompt = self.given.prompt
        for tokens in (self.tokens[: prompt + 4], self.tokens):
            answer = peer.ask("round", limit=900, tokens=tokens, prompt=prompt, setting=setting)
        return answer

    def _errors(self, logits: Path) -> tuple[float | None, float | None]:
        """Relative error and share of equal most likely tokens, against fp32."""
        if not logits.exists():
            return None, None
        wanted, got = self._reference(), np.load(logits)
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        return float(error), float((got.argmax(1) == wanted.argmax(1)).mean())

    def _reference(self) -> Any:
        """Logits of transformers in fp32, its loop over experts; kept beside the model."""
        file = self.work / f"reference-{self.given.prompt}.npy"
        if not file.exists():
            load = {"folder": str(self.work / "hf"), "dtype": "float32"}
            peer = start(self.given.peers, "", "hf.py", self.given.threads, **load)
            setting = {"prefill": "eager", "decode": "eager"}
            ids = self.tokens[: self.given.prompt]
            peer.ask("save_logits", tokens=ids, setting=setting, to=str(file))
            peer.end()
        return np.load(file)


def row(
    contender: Contender,
    running: list[Contender],
    tried: dict[str, Any],
    rounds: dict[str, list[dict]],
    config: dict[str, Any],
    given: argparse.Namespace,
    bandwidth: float,
) -> list[str]:
    """A line of the table: best (median) of each phase, and how many times as fast ours is."""
    mine, found = rounds[contender.name], tried[contender.name]
    if not mine:
        return [contender.name, *["-"] * (len(HEAD) + len(MORE) - 1)]
    ours = next((each.name for each in running if each.ours and each.bits == contender.bits), None)
    cells = [contender.name]
    for phase, tokens in zip(PHASES, (given.prompt, given.new), strict=True):
        seconds = [each[phase] for each in mine]
        rates = tokens / min(seconds), tokens / statistics.median(seconds)
        faster = ratio([each[phase] for each in rounds[ours]], seconds) if ours else None
        cells += [f"{rates[0]:.1f} ({rates[1]:.1f})", shown(faster, ".2f", " x")]
    step = min(each["decode"] for each in mine) / given.new
    needed = active_bytes(config, contender.stored, given.prompt + given.new // 2)
    cells += [f"{needed / step / 1e9:.1f}", f"{needed / step / bandwidth:.0%}"]
    cells.append(f"{max(each['memory'] for each in mine) / 2**30:.2f}")
    cells += [shown(found.error, ".4f"), shown(found.top1, ".1%")]
    best = {str(found.best[phase]) for phase in PHASES}
    return [*cells, "; ".join(sorted(best))]


if __name__ == "__main__":
    main()
