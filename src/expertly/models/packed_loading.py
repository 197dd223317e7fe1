"""Open a model with packed weights: packed while it loads, or from files that are packed."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.configs import read_config
from expertly.models.files import read_headers
from expertly.models.inspect import part_of
from expertly.models.packed_files import stored_tensors
from expertly.models.packed_format import Scheme, check_packed, read_packing
from expertly.models.packed_saving import refuse_resize, refuse_save
from expertly.models.packing import Precision, require_precision, require_seam
from expertly.models.quantizer import PackingConfig, Refused, register_packer

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def chosen_precision(
    folder: Path, bits: int | None, group_size: int | None, schemes: Mapping[str, Scheme]
) -> Precision | None:
    """What bits= and group_size= ask of a folder; None: nothing, or what its files have anyway.

    schemes: what packed_schemes says of it. Raises E202 for a folder that is quantised otherwise,
    E306 for a family without a seam.
    """
    if bits is None and group_size is None:
        return None
    precision, config = require_precision(bits, group_size), read_config(folder)
    require_seam(config)
    usual = usual_scheme(schemes)
    if usual and _agrees(usual, bits, group_size):
        return None
    if said := config.get("quantization_config"):
        how = said.get("quant_method") if isinstance(said, dict) else said
        if usual:
            how = f"{how}, {usual.bits} bits in groups of {usual.group_size}"
        what, why = "bits" if bits else "group_size", f"{folder} is quantised already ({how!s:.80})"
        raise ExpertlyError("E202", what, why, fix=f"leave {what} out, or open the original")
    if precision is None:
        raise ExpertlyError("E202", "group_size", "needs bits beside it", fix="write bits=4 or 8")
    return precision


def usual_scheme(schemes: Mapping[str, Scheme]) -> Scheme | None:
    """That of most packed weights, the head aside; None where none is packed."""
    body = [s for name, s in schemes.items() if part_of(f"{name}.weight") != "head"]
    counted = Counter(body or schemes.values()).most_common(1)
    return counted[0][0] if counted else None


def _agrees(usual: Scheme, bits: int | None, group_size: int | None) -> bool:
    return bits in (None, usual.bits) and group_size in (None, usual.group_size)


def choose_device(folder: Path, bits: int | None = None) -> str:
    """Where a folder runs when nobody says: packed on the CPU, else on the GPU if there is one.

    Raises what packed_schemes raises.
    """
    packed = bits is not None or is_packed_folder(folder)
    return "cuda" if torch.cuda.is_available() and not packed else "cpu"


def packed_schemes(folder: Path) -> dict[str, Scheme]:
    """The schemes of a folder's packed weights, by name; none for a folder that is not packed.

    Raises E301 when config.json or headers do not fit together, E306 for a variety of the format
    that is not read.
    """
    known = read_packing(read_config(folder), str(folder))
    return check_packed(folder, read_headers(folder), known) if known else {}


def is_packed_folder(folder: Path) -> bool:
    """Whether a folder opens packed without bits. Raises what packed_schemes raises."""
    return bool(packed_schemes(folder))


def load_packed(
    folder: Path,
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    precision: Precision | None,
    schemes: Mapping[str, Scheme],
    *,
    dtype: torch.dtype | str,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A folder's model with packed weights, and what transformers says about its tensors.

    kind: the model's class; precision None: as the files have it, by their schemes. options: of
    from_pretrained.
    Raises E202, E301 and E306 as open_model does.
    """
    register_packer()
    if dtype == "auto":
        dtype = config.dtype or _dtype_of(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or transformers unpacks it
    try:
        with stored_tensors(folder, schemes) as tensors:
            opened: Any = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                quantization_config=PackingConfig(precision),
                output_loading_info=True,
                **options,
            )
    except Refused as refused:
        raise refused.error from refused
    model, info = opened
    _name(model, folder)
    return model, info


def finish_packing(model: PreTrainedModel) -> None:
    """Put the packed weights in their places, once all of them are known to be there.

    What transformers would do wrong with them is refused from then on.
    """
    packer: Any = model.hf_quantizer
    packer.install(model)
    refused: dict[str, Any] = {"save_pretrained": refuse_save}
    if isinstance(model.get_output_embeddings(), PackedLinear):
        refused["resize_token_embeddings"] = refuse_resize
    vars(model).update(refused)


def _name(model: PreTrainedModel, folder: Path) -> None:
    """What transformers reads from a folder by its name, which it was not told."""
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _dtype_of(folder: Path) -> torch.dtype:
    """That of the first weight that is a floating-point number, as transformers decides it."""
    found = (_DTYPES[t.dtype] for t in read_headers(folder) if t.dtype in _DTYPES)
    return next(found, torch.float32)
