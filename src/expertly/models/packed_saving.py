"""Save a model with packed weights: as compressed-tensors at 4 and 8 bits, stock at 16.

Weights go to disk under their family's own names, a layer at a time: what transformers merged on
the way in is split on the way out, by its own table of conversions.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from expertly.errors import ExpertlyError
from expertly.folders import read_json, write_json
from expertly.kernels.packed import PackedWeight, unpack
from expertly.kernels.packed_experts import PackedExperts
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.files import layer_of
from expertly.models.packed_writer import (
    FUSED,
    UNFUSE,
    Writer,
    is_record,
    quantization_config,
    replacing,
)
from expertly.models.packing import STACKS, head_name, say_tied
from expertly.models.records import record_of
from expertly.models.stacks import in_rows, unpack_bias, unpack_stack


def save_packed(model: PreTrainedModel, folder: Path, keys: Mapping[str, Any]) -> None:
    """Write config.json, generation_config.json and the weights of a model with packed weights.

    keys: more of config.json. A model that the folder held makes way for it, once it is written.
    Raises, before it writes, E306 for families whose files have experts in one tensor, and for
    float minima.
    """
    stock = _skeleton(model)
    _require_sayable(model, stock)
    with replacing(folder) as hidden:
        writer = _write_weights(model, stock, hidden)
        if model.can_generate():
            model.generation_config.save_pretrained(hidden)
        stock.config.save_pretrained(hidden)
        more = dict(keys)
        if writer.schemes:
            more["quantization_config"] = quantization_config(
                writer, head_name(model), _dense(model)
            )
        write_json(hidden / "config.json", {**read_json(hidden / "config.json"), **more})


def refuse_save(*args: Any, **kwargs: Any) -> None:
    """What a packed model has for save_pretrained, which would write its modules' buffers."""
    why = "transformers cannot write packed weights"
    raise ExpertlyError(
        "E202", "save_pretrained", why, fix="use expertly.save_model(model, folder)"
    )


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """What a model with a packed head has for resize_token_embeddings."""
    why = "a packed head keeps its size"
    raise ExpertlyError(
        "E202", "resize_token_embeddings", why, fix="resize the original, then open it with bits"
    )


def _write_weights(model: PreTrainedModel, stock: PreTrainedModel, folder: Path) -> Writer:
    writer = Writer(folder, torch.float32 if model.dtype == torch.float32 else torch.float16)
    for names in _by_layer(stock):
        shapes = {name: stock.state_dict()[name].shape for name in names}
        tensors = {name: _tensor(model, name, shape) for name, shape in shapes.items()}
        for name, tensor in _in_files(stock, tensors):
            writer.add(name, tensor)
    writer.finish()
    return writer


def _require_sayable(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Raises E306 for packed weights that the format cannot say.

    Records as they would be written, but empty, go the way of the real ones.
    """
    shapes = stock.state_dict()
    for names in _by_layer(stock):
        empty = {}
        for name in names:
            weight = packed_of(model, name)
            if weight is not None and weight.bits < 16:
                _require_levels(model, name, weight)
                empty[name] = torch.empty(*weight.shape[:-1], 8, dtype=torch.uint8, device="meta")
            else:
                empty[name] = shapes[name]
        for name, tensor in _in_files(stock, empty):
            if tensor.dtype == torch.uint8 and not is_record(name, tensor):
                raise ExpertlyError("E306", name, FUSED, fix=UNFUSE)


def _in_files(stock: PreTrainedModel, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer as its family's files name and cut them."""
    for name, tensor in revert_weight_conversion(stock, tensors).items():
        yield name, tensor[0] if isinstance(tensor, list) else tensor


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model as stock code makes it, without weights: what its files must hold."""
    config = deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    if isinstance(model.get_output_embeddings(), PackedLinear):
        say_tied(config, tied=_is_embedding(model))
    with torch.device("meta"):
        made = type(model)(config)
    if hasattr(model, "_weight_conversions"):
        made._weight_conversions = model._weight_conversions
    return made


def _dense(model: PreTrainedModel) -> list[str]:
    """The linears that stay as they are, by the names that they have in the model."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _is_embedding(model: PreTrainedModel) -> bool:
    """Whether files need no head: its numbers, at 16 bits, are the embedding's."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight.bits < 16 or not model._tied_weights_keys or head.bias is not None:
        return False
    return unpack(head.weight).q.equal(embedding.weight.to(torch.bfloat16))


def _by_layer(stock: PreTrainedModel) -> Iterator[list[str]]:
    """Names of the tensors that the stock model's files hold, those of a layer together."""
    names: dict[int | None, list[str]] = {}
    tied = stock.all_tied_weights_keys
    for name in stock.state_dict():
        if name not in tied:
            names.setdefault(layer_of(name), []).append(name)
    yield from names.values()


def packed_of(model: PreTrainedModel, name: str) -> PackedWeight | None:
    """The packed weight that a stock name stands for; None where it is not packed."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if isinstance(module, PackedLinear):
        return module.weight if leaf == "weight" else None
    packed = getattr(module, "packed", None)
    if not isinstance(packed, PackedExperts) or leaf not in STACKS:
        return None
    return packed.down if leaf == "down_proj" else packed.gate_up


def _require_levels(model: PreTrainedModel, name: str, weight: PackedWeight) -> None:
    """Raises E306 for a weight of 4 or 8 bits that is no matrix of levels and whole numbers."""
    if weight.zeros is not None and weight.zeros.dtype != torch.uint8:
        why = "its groups have float minima, which pack-quantized cannot say"
        raise ExpertlyError("E306", name, why, fix="pack it symmetrically, or with zero points")
    module = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(module, PackedLinear) and not in_rows(module):
        raise ExpertlyError("E306", name, FUSED, fix=UNFUSE)


def _tensor(model: PreTrainedModel, name: str, shape: torch.Size) -> Tensor:
    """A tensor by its stock name: a record where it is packed in 4 or 8 bits."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    weight, linear = packed_of(model, name), isinstance(module, PackedLinear)
    if weight is not None and weight.bits < 16:
        return record_of(weight)
    if weight is not None:
        return unpack(weight).q if linear else unpack_stack(module, leaf, weight, shape)
    stack = leaf.removesuffix("_bias")
    packed = getattr(module, "packed", None)
    if stack in STACKS and isinstance(packed, PackedExperts):
        bias = packed.down_bias if stack == "down_proj" else packed.gate_up_bias
        assert bias is not None
        return unpack_bias(module, stack, bias, shape)
    tensor = getattr(module, leaf)
    return tensor.detach().to(model.dtype if linear else tensor.dtype)
