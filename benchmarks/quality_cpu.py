"""What packing costs in quality: perplexity and agreement beside fp32, and beside llama.cpp.

Run: python benchmarks/quality_cpu.py smollm2 [--gguf FILE] [--work DIR] [--tokens 4096]
     python benchmarks/quality_cpu.py trained FOLDER --peers DIR [--work DIR] [--tokens 4096]
smollm2 (smollm2.py says what it needs): SmolLM2-135M-Instruct, a GGUF of Q4_1 and others: read
into fp32, then opened at 8 bits; and its Q4_1 blocks repacked at 4 bits, which must give the same
numbers. Exits with 1 below 96.5 % agreement, above 1 % perplexity,
or when a number differs. trained: a small MoE of ours (expertly demo writes runs/demo/moe/
checkpoint-300) at 8 and 4 bits, beside llama.cpp's Q8_0 and Q4_0 of the same weights. `by search`
are scales of least squared error, in fp32 arithmetic. The text is Python's own documentation.
"""

import argparse
import math
import pydoc_data.topics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import smollm2 as small
import torch
import torch.nn.functional as F
from model_files import make_gguf
from side_by_side import parser, shown, start, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from wire import PeerError

import expertly
from expertly.kernels.gguf_blocks import from_gguf
from expertly.kernels.packed import dequantize
from expertly.kernels.quantize import quantize
from expertly.models.packing import Precision, plan_packing

AGREE, WORSE = 0.965, 0.01
_FLASH = {"flash": False}


class Scored(NamedTuple):
    """Over all positions: mean loss in nats, the most likely tokens, logits (tokens, vocab)."""

    loss: float
    top: Tensor
    logits: Tensor


Score = Callable[[list[int]], Tensor]


def main() -> int:
    given = arguments()
    given.work = given.work or Path(tempfile.mkdtemp())
    given.work.mkdir(parents=True, exist_ok=True)
    return smollm2(given) if given.model == "smollm2" else trained(given)


def arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=1)
    made.add_argument("model", choices=("smollm2", "trained"))
    made.add_argument("folder", type=Path, nargs="?", help="the trained model's")
    made.add_argument("--gguf", type=Path, help="SmolLM2's, where it is not installed")
    made.add_argument("--work", type=Path)
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--window", type=int, default=256)
    made.add_argument("--threads", type=int, default=2)
    return made.parse_args()


def smollm2(given: argparse.Namespace) -> int:
    file, folder = given.gguf or small.shipped_gguf(), given.work / "smollm2"
    if not folder.exists():
        small.write(file, folder)
    texts = windows(AutoTokenizer.from_pretrained(folder), given)
    wanted = score(stock(in_fp32(folder)), texts)
    got = score(stock(expertly.open_model(folder, bits=8, dtype=torch.float32)), texts)
    rows = [line("fp32", wanted, wanted), line("8 bits", got, wanted)]
    print(table(("SmolLM2-135M", "perplexity", "against fp32", "top-1", "logits"), rows))
    found = {kind: (tensors, far) for kind, tensors, far in repacked(file)}
    for kind, (tensors, far) in found.items():
        print(f"{kind}: {tensors} tensors repacked, {far} numbers differ")
    agree = float((got.top == wanted.top).float().mean())
    worse = math.exp(got.loss - wanted.loss) - 1
    return int(agree < AGREE or abs(worse) > WORSE or any(far for _, far in found.values()))


def repacked(file: Path) -> Iterator[tuple[str, int, int]]:
    """By kind of block: how many tensors, and how many numbers our packed weights say otherwise."""
    import gguf

    counts: dict[str, list[int]] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        if kind not in ("Q4_0", "Q4_1", "Q8_0"):
            continue
        wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        # the reader's memory is read-only, which torch warns of
        packed = from_gguf(torch.from_numpy(np.array(tensor.data)), kind)
        differ = int((dequantize(packed).view(wanted.shape) != wanted).sum())
        counts.setdefault(kind, []).append(differ)
    for kind, each in counts.items():
        yield kind, len(each), sum(each)


def trained(given: argparse.Namespace) -> int:
    folder = given.folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = windows(tokenizer, given)
    wanted = score(stock(in_fp32(folder)), texts)
    rows = [line("fp32", wanted, wanted)]
    for bits in (8, 4):
        ours = expertly.open_model(folder, bits=bits, dtype=torch.float32)
        rows.append(line(f"expertly {bits} bits", score(stock(ours), texts), wanted))
    for search in (False, True):
        name = f"4 bits {'by search' if search else 'rounded'}, fp32 arithmetic"
        rows.append(line(name, score(stock(emulated(folder, search)), texts), wanted))
    for kind in ("q8_0", "q4_0"):
        rows.append(llama(kind, given, texts, wanted))
    print(table(("trained MoE", "perplexity", "against fp32", "top-1", "logits"), rows))
    return 0


def emulated(folder: Path, search: bool) -> Any:
    """The model in fp32 with the numbers that its weights have when they are packed at 4 bits."""
    model = in_fp32(folder)
    parameters = dict(model.named_parameters())
    for name, precision in plan_packing(model, Precision(4, 32)).items():
        if (weight := parameters.get(name)) is not None:  # tied: packed where it is the head
            packed = quantize(weight.data, precision.bits, precision.group_size, search=search)
            weight.data.copy_(dequantize(packed))
    return model


def llama(
    kind: str, given: argparse.Namespace, texts: list[list[int]], wanted: Scored
) -> list[str]:
    name = f"llama.cpp {kind.upper()}"
    why = make_gguf(given.peers, given.folder, given.work)
    if why:
        return [name, why, "-", "-", "-"]
    logits = given.work / "logits.npy"
    try:
        load = {"folder": str(given.work), "file": f"{kind}.gguf"}
        peer = start(given.peers, "llama", "llamacpp.py", given.threads, **load)

        def of(ids: list[int]) -> Tensor:
            peer.ask("save_logits", tokens=ids, setting=_FLASH, to=str(logits))
            return torch.from_numpy(np.load(logits))

        found = line(name, score(of, texts), wanted)
        peer.end()
    except PeerError as error:
        return [name, str(error), "-", "-", "-"]
    return found


def windows(tokenizer: Any, given: argparse.Namespace) -> list[list[int]]:
    """Pieces of Python's documentation, of one length."""
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text[: 8 * given.tokens])["input_ids"][: given.tokens]
    starts = range(0, len(ids) - given.window + 1, given.window)
    return [ids[at : at + given.window] for at in starts]


def in_fp32(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stock(model: Any) -> Score:
    """Logits (tokens, vocab) of a transformers model."""

    @torch.inference_mode()
    def of(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0].float()

    return of


def score(of: Score, texts: list[list[int]]) -> Scored:
    """Teacher forcing: every position says the next token."""
    losses, tops, kept = [], [], []
    for ids in texts:
        logits = of(ids)
        losses.append(float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]))))
        tops.append(logits[:-1].argmax(1))
        kept.append(logits[:-1].half())
    return Scored(sum(losses) / len(losses), torch.cat(tops), torch.cat(kept))


def line(name: str, got: Scored, wanted: Scored) -> list[str]:
    """A row: perplexity, how much worse, agreement, relative error of the logits."""
    agree = float((got.top == wanted.top).float().mean())
    far = (got.logits.float() - wanted.logits.float()).norm() / wanted.logits.float().norm()
    worse = math.exp(got.loss - wanted.loss) - 1
    cells = [name, shown(math.exp(got.loss), ".3f"), shown(worse, "+.2%")]
    return [*cells, shown(agree, ".2%"), shown(float(far), ".4f")]


if __name__ == "__main__":
    raise SystemExit(main())
