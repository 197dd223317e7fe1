"""In which format each part of a model lies, and how many bytes that is: all, and per step.

`precision` turns the words of a command line into a format per part; `weights` counts bytes.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from expertly.errors import ExpertlyError, nearest
from expertly.plan.shape import PARTS, Shape, parameters
from expertly.plan.touched import experts_touched


class Format(NamedTuple):
    """How a weight is stored: its bits, and those of scales and zeros for each weight."""

    name: str
    bits: float
    overhead: float = 0.0


class Bytes(NamedTuple):
    """What has to lie in memory, and what one decode step reads of it."""

    resident: float
    touched: float


Precision = Mapping[str, Format]  # every part of a model -> its format

# what quantizers reach; routers, norms, embeddings and head stay as they are
QUANTISABLE = ("experts", "shared experts", "dense layers", "attention")
_SCALE = 16  # bits of a group's scale; its zero has as many as a weight
_GROUP = 128  # weights to a group (EAC-MoE, section 4.1)


def _grouped(bits: float, group: int = _GROUP, name: str | None = None) -> Format:
    return Format(name or f"int{bits:g}", bits, (_SCALE + bits) / group)


FORMATS: dict[str, Format] = {
    "fp32": Format("fp32", 32),
    "fp16": Format("fp16", 16),
    "bf16": Format("bf16", 16),
    "fp8": Format("fp8", 8, 32 / 128**2),  # an fp32 scale for a block of 128 x 128 (DeepSeek-V3)
    "mxfp4": Format("mxfp4", 4, 8 / 32),  # an 8-bit scale for 32 weights (OCP MX)
    **{f"int{bits}": _grouped(bits) for bits in (8, 4, 3, 2)},
}
_ALIASES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_BITS = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,4})?)(?:g([0-9]{1,5}))?")


def precision(shape: Shape, dtype: str | None = None, bits: str | None = None) -> Precision:
    """The format of every part.

    dtype: a name as format_of has it, for all parts; None: as the model's checkpoint has them,
    bf16 where it does not say. bits: over it, for attention and feed-forwards alone: "4", "2.5" (a
    mix of 2 and 3 bits), "4g32" (groups of 32, not 128), with exceptions, "3,attention=4"; 16 is
    bf16. Raises E208 for a dtype, a part, bits (1 to 16) or a group (1 to 65536) that there is not.
    """
    stored = shape.stored or {}
    names = {part: stored.get(part, "bf16") if dtype is None else dtype for part in PARTS}
    formats = {part: _named(name) for part, name in names.items()}
    words = [] if bits is None else bits.split(",")
    for place, word in enumerate(words):
        formats.update(_said(word.strip(), first=place == 0))
    return formats


def format_of(name: str) -> Format | None:
    """A format by its name: one of FORMATS, "float16", "int5" or "int4g32"; None for no format."""
    known = _ALIASES.get(name.lower(), name.lower())
    found = FORMATS.get(known)
    return found or (_in_bits(known[3:]) if known.startswith("int") else None)


def symmetric(bits: int, group: int) -> Format:
    """Integers in groups with a scale and no zero, as the packed kernels read them; 16: bf16."""
    if bits == 16:
        return FORMATS["bf16"]
    return Format(f"int{bits}g{group}", bits, _SCALE / group)


def name_of(precision: Precision, shape: Shape | None = None) -> str:
    """A short name for tables: "bf16", "int4 (attention bf16)". shape: name only its parts."""
    there = parameters(shape) if shape else PARTS
    parts = [part for part in QUANTISABLE if part in there] or [*QUANTISABLE]
    main = precision[parts[0]].name
    others: dict[str, list[str]] = {}
    for part in parts:
        others.setdefault(precision[part].name, []).append(part)
    others.pop(main)
    rest = [f"{', '.join(some)} {name}" for name, some in others.items()]
    return f"{main} ({'; '.join(rest)})" if rest else main


def weight_bytes(weights: float, stored: Format) -> float:
    """Bytes of so many weights, with their scales and zeros."""
    return weights * (stored.bits + stored.overhead) / 8


def weights(shape: Shape, precision: Precision, batch: float = 1) -> dict[str, Bytes]:
    """Bytes by part: all of them, and what one decode step of `batch` tokens reads.

    It reads every dense part of the decoder, the distinct experts that its tokens choose, and one
    row of the embeddings for each token, or the whole table where it is the head too.
    """
    read = _read(shape, batch)
    return {
        part: Bytes(*(weight_bytes(each, precision[part]) for each in (count.total, read[part])))
        for part, count in parameters(shape).items()
    }


def _read(shape: Shape, batch: float) -> dict[str, float]:
    """Weights that one decode step reads, by part."""
    read = dict.fromkeys(PARTS, 0.0)
    decoder = shape.decoder
    read.update({part: count.active for part, count in parameters(decoder).items()})
    moes = [(layer.feed_forward, many) for layer, many in decoder.kinds.items()]
    read["experts"] = sum(
        many * experts_touched(moe.experts, moe.top_k, batch) * moe.expert for moe, many in moes
    )
    if not shape.tied:
        read["embeddings"] = min(batch * shape.dim, shape.embeddings)
    return read


def _named(name: str) -> Format:
    """A format by its name; E208 for an unknown one."""
    found = format_of(name)
    if found is None:
        fix = nearest(name.lower(), FORMATS)
        raise ExpertlyError("E208", "--dtype", f"{name[:40]!r} is no format", fix=fix)
    return found


def _said(word: str, *, first: bool) -> dict[str, Format]:
    """What one word of --bits says, "4" or "attention=4"; only the first may name no part."""
    part, equals, bits = word.rpartition("=")
    part = part.strip().replace("_", " ").replace("-", " ")
    if not equals and first:
        return dict.fromkeys(QUANTISABLE, _of_bits(word))
    if part not in QUANTISABLE:
        raise _wrong(word, f"is not PART=BITS, PART one of {', '.join(QUANTISABLE)}")
    return {part: _of_bits(bits.strip())}


def _of_bits(text: str) -> Format:
    """The format for "4", "2.5" or "4g32"; E208 for no bits."""
    found = _in_bits(text)
    if found is None:
        raise _wrong(text, "is not BITS, 1 to 16, or BITSgGROUP, GROUP 1 to 65536")
    return found


def _in_bits(text: str) -> Format | None:
    found = _BITS.fullmatch(text)
    bits, group = (float(found[1]), int(found[2] or _GROUP)) if found else (0.0, 0)
    if not (1 <= bits <= 16 and 1 <= group <= 65536):
        return None
    if bits == 16:
        return FORMATS["bf16"]
    name = f"int{bits:g}" + (f"g{group}" if group != _GROUP else "")
    return _grouped(bits, group, name)


def _wrong(said: str, why: str) -> ExpertlyError:
    return ExpertlyError("E208", "--bits", f"{said[:40]!r} {why}", fix="correct --bits")
