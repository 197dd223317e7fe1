"""Experts alone on a CPU beside other engines: time, bandwidth, operations, error.

Run: python benchmarks/experts_cpu.py --peers DIR [--shape LAYERS EXPERTS TOP_K DIM WIDTH]
         [--tokens 1 4 16 128 even] [--threads 2 1] [--rounds 7] [--only NAME ..] [--json FILE]
Every layer has weights of its own, every call a routing draw of its own (layer.py), so that weights
come from memory. Contenders of as many bits are loaded together, a process each, and take turns;
the one that is not timed is stopped. even: as many tokens as give every expert 128. GB/s counts the
weights and scales of the different experts that were read; GOP/s two operations a weight and token.
error: relative, against float64 with the weights as they were; kernel: with those that it stores.
Ratios are medians over rounds of ours at the same bits against theirs: above 1, we are faster.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from side_by_side import parser, ratio, read_bandwidth, shown, start, table, wanted, write_json
from wire import Peer, PeerError

EVEN = "even"
FULL = 128  # tokens of every expert in that case
HEAD = ("contender", "ms", "ours is", "GB/s", "of read", "GOP/s", "error", "kernel")
_ERROR_TOKENS = 16


class Contender(NamedTuple):
    """stored: bits a weight takes, scales included. most: tokens that it is asked for at most."""

    name: str
    bits: int
    stored: float
    environment: str
    worker: str
    options: dict[str, Any]
    most: float = float("inf")
    ours: bool = False


def contenders(dim: int) -> list[Contender]:
    """By bits; ours first among those of as many."""
    row = 32 / dim  # one float scale a row
    found = [
        Contender(
            f"expertly {bits} bits", bits, stored, "", "layer_ours.py", {"bits": bits}, ours=True
        )
        for bits, stored in ((4, 4.5), (8, 8.5), (16, 16))
    ]
    for bits, kind, stored in ((4, "Int4", 4 + row), (8, "Int8", 8 + row), (16, "BF16", 16)):
        options = {"kind": f"AMX{kind}_MOE"}
        found.append(Contender(f"kt-kernel {kind}", bits, stored, "kt", "layer_kt.py", options))
    for bits in (4, 8):
        name, stored = f"onnxruntime QMoE {bits} bits", bits + 1.0  # a float scale for 32
        found.append(Contender(name, bits, stored, "ort", "layer_ort.py", {"bits": bits}))
    for isa in ("vec", "amx"):
        found.append(Contender(f"vLLM bf16 {isa}", 16, 16, "vllm", "layer_vllm.py", {"isa": isa}))
    found += _transformers()
    return sorted(found, key=lambda each: (each.bits, not each.ours))


def _transformers() -> Iterator[Contender]:
    """batched_mm copies the weights of every token's experts: for few tokens only."""
    for dtype, stored in (("bfloat16", 16), ("float32", 32)):
        for way in ("eager", "grouped_mm", "batched_mm", "batched_mm compiled"):
            implementation, _, compiled = way.partition(" ")
            options = {"dtype": dtype, "implementation": implementation, "compiled": bool(compiled)}
            most = 16 if implementation == "batched_mm" else float("inf")
            name = f"transformers {dtype} {way}"
            yield Contender(name, 16, stored, "", "layer_hf.py", options, most)


def main() -> None:
    given = arguments()
    asked = [each for each in contenders(given.shape[3]) if wanted(each.name, given.only)]
    found: dict[str, Any] = {}
    for threads in given.threads:
        bandwidth = read_bandwidth(threads)
        timed: dict[str, Any] = {}
        failed: dict[str, Any] = {}
        for bits in (4, 8, 16):
            group = [each for each in asked if each.bits == bits]
            run_group(group, threads, given, timed, failed)
        bandwidth = max(bandwidth, read_bandwidth(threads))
        found[f"{threads} threads"] = {"bandwidth": bandwidth, "timed": timed, "failed": failed}
        print(f"\n{threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
        for case in given.tokens:
            print(f"\ntokens a call: {tokens_of(case, given.shape)} ({case})\n")
            rows = [row(each, asked, case, timed, given, bandwidth) for each in asked]
            print(table(HEAD, [each for each in rows if each]))
        for name, why in failed.items():
            print(f"* {name}: {why}")
    write_json(given.json, found)


def arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=7)
    names = ("LAYERS", "EXPERTS", "TOP_K", "DIM", "WIDTH")
    shape = [16, 64, 8, 1024, 512]
    made.add_argument("--shape", type=int, nargs=5, metavar=names, default=shape)
    made.add_argument("--tokens", nargs="+", default=["1", "4", "16", "128", EVEN])
    made.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    return made.parse_args()


def tokens_of(case: str, shape: list[int]) -> int:
    return FULL * shape[1] // shape[2] if case == EVEN else int(case)


def layers_of(case: str, shape: list[int]) -> int:
    """Layers a round: all where a call is short, a few where one reads all experts anyway."""
    tokens = tokens_of(case, shape)
    return shape[0] if tokens <= 16 else max(1, shape[0] // (4 if tokens <= 128 else 8))


def run_group(
    group: list[Contender],
    threads: int,
    given: argparse.Namespace,
    timed: dict[str, Any],
    failed: dict[str, str],
) -> None:
    """Load contenders together and time them in turn; what they answer goes into timed, failed."""
    peers = loaded(group, threads, given, timed, failed)
    for case in given.tokens:
        for number in range(given.rounds + 1):  # the first makes what is made at a first call
            for each in group:
                if each.name not in peers or tokens_of(case, given.shape) > each.most:
                    continue
                try:
                    answer = ask_round(peers[each.name], case, given.shape)
                except PeerError as why:
                    failed[each.name] = str(why)
                    peers.pop(each.name).end()
                    continue
                timed[each.name][case] += [answer] if number else []
        print(f"{threads} threads, {len(peers)} contenders, {case}: done", flush=True)
    for peer in peers.values():
        peer.end()


def loaded(
    group: list[Contender],
    threads: int,
    given: argparse.Namespace,
    timed: dict[str, Any],
    failed: dict[str, str],
) -> dict[str, Peer]:
    """Those that can be loaded, by name, and their errors."""
    peers: dict[str, Peer] = {}
    for each in group:
        try:
            options = {**each.options, "shape": given.shape}
            peer = start(given.peers, each.environment, each.worker, threads, **options)
            error = peer.ask("error", tokens=_ERROR_TOKENS)
        except PeerError as why:
            failed[each.name] = str(why)
            continue
        peers[each.name] = peer
        timed[each.name] = {"error": error, **{case: [] for case in given.tokens}}
    return peers


def ask_round(peer: Peer, case: str, shape: list[int]) -> dict[str, Any]:
    tokens, layers = tokens_of(case, shape), layers_of(case, shape)
    return peer.ask("round", limit=900, tokens=tokens, layers=layers, even=case == EVEN)


def row(
    contender: Contender,
    asked: list[Contender],
    case: str,
    timed: dict[str, Any],
    given: argparse.Namespace,
    bandwidth: float,
) -> list[str] | None:
    """A line of the table: best (median) milliseconds a layer, and what follows from the best."""
    answers = timed.get(contender.name, {}).get(case)
    if not answers:
        return None
    seconds = [each["seconds"] for each in answers]
    ours = next((each.name for each in asked if each.ours and each.bits == contender.bits), "")
    mine = [each["seconds"] for each in timed.get(ours, {}).get(case, [])]
    _, _, top_k, dim, width = given.shape
    weights = 3 * dim * width
    read = statistics.median(each["distinct"] for each in answers) * weights * contender.stored / 8
    rate = read / min(seconds)
    operations = 2 * tokens_of(case, given.shape) * top_k * weights / min(seconds)
    error = timed[contender.name]["error"]
    return [
        contender.name,
        f"{min(seconds) * 1e3:.3f} ({statistics.median(seconds) * 1e3:.3f})",
        shown(ratio(mine, seconds), ".2f", " x"),
        f"{rate / 1e9:.1f}",
        f"{rate / bandwidth:.0%}",
        f"{operations / 1e9:.0f}",
        shown(error["error"], ".1e"),
        shown(error["kernel"], ".1e"),
    ]


if __name__ == "__main__":
    main()
