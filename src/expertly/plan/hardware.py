"""What machines can do: the table of hardware.yaml, with a user's own file laid over it.

Figures are peaks by data sheet. Nothing reaches them; a plan's times are lower bounds.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from expertly.config import load
from expertly.errors import ExpertlyError, nearest

MACHINE = 8  # GPUs in one, at most
_LINKS = ("link", "network", "host_link")
_TABLE = Path(__file__).with_name("hardware.yaml")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins two devices, or a device and what it offloads to."""

    name: str = ""  # the key in the file
    bandwidth: float  # bytes per second, one direction
    latency: float = 0.0  # seconds
    source: str = "given"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _not_positive({"bandwidth": self.bandwidth})
        if self.latency < 0:
            yield "latency", f"is {self.latency}, less than no time"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one GPU can do, or a computer with one memory. FLOP rates are dense, by format."""

    name: str = ""  # the key in the file
    memory: float  # bytes
    bandwidth: float  # bytes per second, of its memory
    flops: dict[str, float]  # per second; fp32, bf16, and fp8 if it has units; see flops_at
    watts: float | None = None
    usd_per_hour: float | None = None  # None: nobody rents it out
    kernel: float = 2e-6  # seconds to launch one
    source: str = "given"


@dataclass(frozen=True, kw_only=True)
class Device(Figures):
    """A device with its links."""

    link: Link  # between those of one machine
    network: Link  # between machines
    host_link: Link  # from what experts are offloaded to


@dataclass(frozen=True, kw_only=True)
class _Entry(Figures):
    """A device as the file has it: with the names of its links."""

    link: str
    network: str = "infiniband-400"
    host_link: str

    def problems(self) -> Iterator[tuple[str, str]]:
        numbers = {name: getattr(self, name) for name in ("memory", "bandwidth", "watts")}
        yield from _not_positive(numbers)
        yield from _not_positive({f"flops.{name}": rate for name, rate in self.flops.items()})
        if "bf16" not in self.flops:
            yield "flops", "has no bf16"
        for name in ("kernel", "usd_per_hour"):
            if (getattr(self, name) or 0) < 0:
                yield name, f"is {getattr(self, name)}, less than nothing"


@dataclass(frozen=True, kw_only=True)
class _Hardware:
    devices: dict[str, _Entry] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, device in self.devices.items():
            for leaf in _LINKS:
                if (link := getattr(device, leaf)) not in self.links:
                    yield f"devices.{name}.{leaf}", f"is {link}, which links does not have"


@dataclass(frozen=True, kw_only=True)
class _Edits:
    """A user's file: entries may be in part."""

    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: dict[str, dict[str, Any]] = field(default_factory=dict)


def devices(extra: Path | None = None) -> dict[str, Device]:
    """Every device by name, with its links. extra: a file like hardware.yaml, laid over it line
    by line.

    Raises E201, E202 or E203 for a file that is not like that.
    """
    known = links(extra)
    return {key: _joined(key, entry, known) for key, entry in _hardware(extra).devices.items()}


def links(extra: Path | None = None) -> dict[str, Link]:
    """Every link by name, as `devices` does."""
    return {key: replace(held, name=key) for key, held in _hardware(extra).links.items()}


def device_of(name: str, extra: Path | None = None) -> Device:
    """A device by name, in capitals or not. Raises E208 for an unknown one."""
    return _named(name, devices(extra), "--gpu", "device")


def link_of(name: str, extra: Path | None = None, flag: str = "--link") -> Link:
    """A link by name, in capitals or not. Raises E208 for an unknown one, said by that flag."""
    return _named(name, links(extra), flag, "link")


def between(device: Device, gpus: int) -> Link:
    """What joins so many of a device: its own link in one machine, a network beyond 8 of them."""
    return device.link if gpus <= MACHINE else device.network


def flops_at(device: Device, format_name: str, part: str = "") -> float:
    """FLOP/s of a device with weights of that format.

    A device may have a rate for just that part of a model ("int4g32 experts"), or for the format.
    fp8 has its own units where there are any. Else integers and fewer bits only make weights
    smaller and are computed with in bf16; so are all of fp16, which is as fast.
    """
    rates = device.flops
    return rates.get(f"{format_name} {part}") or rates.get(format_name) or rates["bf16"]


def _joined(name: str, entry: _Entry, known: Mapping[str, Link]) -> Device:
    """A device of the file with its links themselves."""
    figures = {each.name: getattr(entry, each.name) for each in fields(Figures)}
    ends = {leaf: known[getattr(entry, leaf)] for leaf in _LINKS}
    return Device(**{**figures, **ends, "name": name})


@cache
def _hardware(extra: Path | None) -> _Hardware:
    return load(_Hardware, _TABLE, () if extra is None else tuple(_lines(extra)))


def _lines(extra: Path) -> Iterator[str]:
    """A user's file as overrides of ours, so that errors name its keys."""
    edits = load(_Edits, extra)
    for section in ("devices", "links"):
        for name, entry in getattr(edits, section).items():
            for key, value in entry.items():
                yield f"{section}.{name}.{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def _named(name: str, known: Mapping[str, T], flag: str, what: str) -> T:
    word, keys = name.strip().casefold(), {key.casefold(): key for key in known}
    if word in keys:
        return known[keys[word]]
    close = [held for key, held in keys.items() if word and (word in key or key in word)]
    fix = f"write {' or '.join(close)}" if close else nearest(word, known)
    raise ExpertlyError("E208", f"{flag} {name[:40]}", f"no {what} that we know", fix=fix)


def _not_positive(numbers: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    for name, number in numbers.items():
        if number is not None and number <= 0:
            yield name, f"is {number}, not above 0"
