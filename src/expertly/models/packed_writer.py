"""The files of a packed checkpoint: tensors in shards, and what config.json says about them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST, write_json
from expertly.models.files import INDEX, WEIGHTS
from expertly.models.inspect import part_of
from expertly.models.packed_files import pack_zeros
from expertly.models.packed_format import FORMAT, METHOD, PACKED, SCALE, SHAPE, ZERO, Scheme
from expertly.models.records import seen_as, split_record

FUSED = "its family's files hold experts in one tensor, which pack-quantized cannot say"
UNFUSE = "save it with bits=16"
_SHARD = 2 * 10**9  # bytes, after which the next file begins; so much is held on the way


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` to write a model into, which then takes the place of its own.

    What was there stays as it was when the writing fails. Then come renames alone: the weights,
    config.json last. Weights, an index and a manifest of the model before go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".new.", dir=folder) as made:
        yield Path(made)
        files = sorted(Path(made).iterdir(), key=lambda file: file.name == "config.json")
        new = {file.name for file in files}
        old = {INDEX, MANIFEST, *(file.name for file in folder.glob("model*.safetensors"))} - new
        for file in files[:-1]:
            file.replace(folder / file.name)
        for name in old:
            (folder / name).unlink(missing_ok=True)
        files[-1].replace(folder / files[-1].name)


class Writer:
    """Writes tensors into as many files as they need; records as the parts of the format."""

    def __init__(self, folder: Path, scales: torch.dtype) -> None:
        self.schemes: dict[str, Scheme] = {}  # by the module's name in the files
        self.plain: list[str] = []  # modules whose matrix is not packed
        self._folder, self._scales = folder, scales
        self._shard: dict[str, Tensor] = {}
        self._held = 0  # bytes of the shard
        self._files: list[list[str]] = []  # the tensors of each
        self._bytes = self._weights = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or the parts of a record. Raises E306 for a record of no matrix."""
        module = name.removesuffix(".weight")
        if tensor.dtype == torch.uint8:
            if not is_record(name, tensor):
                raise ExpertlyError("E306", name, FUSED, fix=UNFUSE)
            self._add_record(module, tensor)
            return
        if tensor.dim() == 2 and module != name and part_of(name) != "embeddings":
            self.plain.append(module)
        self._put(name, tensor.contiguous(), tensor.numel())

    def finish(self) -> None:
        """Write the rest, give the files their names, and an index where there are several."""
        if self._shard or not self._files:
            self._flush()
        if len(self._files) == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        where = {}
        for index, names in enumerate(self._files):
            file = f"model-{index + 1:05}-of-{len(self._files):05}.safetensors"
            self._part(index).rename(self._folder / file)
            where.update(dict.fromkeys(names, file))
        counts = {"total_parameters": self._weights, "total_size": self._bytes}
        write_json(self._folder / INDEX, {"metadata": counts, "weight_map": where})

    def _add_record(self, module: str, rows: Tensor) -> None:
        record = split_record(rows, module)
        out, width = rows.shape[0], record.scales.shape[1] * record.group_size
        self.schemes[module] = Scheme(record.bits, record.group_size, record.zeros is None)
        self._put(module + PACKED, seen_as(record.levels, torch.int32), out * width)
        self._put(module + SCALE, record.scales.to(self._scales))
        self._put(module + SHAPE, torch.tensor([out, width]))
        if record.zeros is not None:
            self._put(module + ZERO, pack_zeros(record.zeros, record.bits))

    def _put(self, name: str, tensor: Tensor, weights: int = 0) -> None:
        if self._shard and self._held + tensor.nbytes > _SHARD:
            self._flush()
        self._shard[name] = tensor
        self._held += tensor.nbytes
        self._bytes += tensor.nbytes
        self._weights += weights

    def _flush(self) -> None:
        save_file(self._shard, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._shard))
        self._shard, self._held = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"


def is_record(name: str, rows: Tensor) -> bool:
    """Whether a tensor is one matrix with a module's name, as the format asks."""
    return rows.dim() == 2 and name.endswith(".weight")


def quantization_config(writer: Writer, head: str | None, dense: Iterable[str]) -> dict[str, Any]:
    """What config.json says about packed files, for transformers and for vLLM.

    head: the head's name; dense: names in the model, where they may differ from the files', of
    linears that are not packed. The scheme of most matrices stands for every linear; the head,
    and matrices of other schemes, are named.
    """
    heads = [name for name in writer.schemes if head and name.split(".")[-1] == head.split(".")[-1]]
    usual = Counter(s for name, s in writer.schemes.items() if name not in heads).most_common(1)
    groups = [(scheme, ["Linear"]) for scheme, _ in usual]
    others = [name for name, s in writer.schemes.items() if name in heads or s != groups[0][0]]
    for scheme in dict.fromkeys(writer.schemes[name] for name in others):
        names = [name for name in others if writer.schemes[name] == scheme]
        groups.append((scheme, names + [head for _ in heads[:1] if head and head not in names]))
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(groups)},
        "ignore": sorted({*writer.plain, *dense}),
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
