"""Packing while loading: a quantizer of transformers that packs each weight as it arrives.

transformers reads a weight, brings it into the family's layout and hands it to a quantizer before
it reads the next one. Ours keeps the packed weight and lets the rest go, so no more than a layer
is ever held in high precision. It stays on the model only until the weights are in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertly.errors import ExpertlyError
from expertly.kernels.packed import PackedWeight, dequantize
from expertly.kernels.packed_experts import PackedExperts, empty_experts, sizes_of, split_gate
from expertly.kernels.quantize import quantize
from expertly.models.packing import (
    STACKS,
    Precision,
    experts_modules,
    head_name,
    install_experts,
    install_linear,
    plan_packing,
    say_tied,
)
from expertly.models.records import pack_record
from expertly.models.stacks import in_rows

_METHOD = "expertly"  # the quantizer's name in transformers


class PackingConfig(QuantizationConfigMixin):
    """What transformers passes on to the quantizer. precision None: as the files say."""

    def __init__(self, precision: Precision | None) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.precision = precision


class Refused(BaseException):
    """Carries an ExpertlyError past transformers, which collects every Exception instead."""

    def __init__(self, error: ExpertlyError):
        self.error = error
        super().__init__(error)


class Packer(HfQuantizer):
    """Collects packed weights while a model loads; install puts them into it."""

    quantization_config: PackingConfig

    def __init__(self, quantization_config: PackingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._plan: Mapping[str, Precision] = {}
        self._tied_head: tuple[str, Precision] | None = None
        self._weights: dict[str, PackedWeight] = {}  # by the parameters' names
        self._experts: dict[str, PackedExperts] = {}  # by the modules' names

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        precision = self.quantization_config.precision
        if precision is None:
            return
        plan = plan_packing(model, precision)
        head = head_name(model)
        if head and f"{head}.weight" in model.all_tied_weights_keys:
            self._tied_head = head, plan.pop(f"{head}.weight")
        self._plan = plan

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        # of packed files any weight may come as a record
        return self.quantization_config.precision is None or param_name in self._plan

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def take(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor | None:
        """Keep a weight packed; returns it when it is to stay as it is.

        Raises E301 for values that are not finite or a shape that is not the model's, E306 for a
        layout that packed files cannot have.
        """
        shape = model.get_parameter_or_buffer(name).shape
        if weight.dtype == torch.uint8:
            return self._take_record(model, name, weight, shape)
        if weight.shape != shape:
            raise wrong_shape(name, tuple(weight.shape), tuple(shape))
        if name not in self._plan:
            return weight
        bits, group_size = self._plan[name]
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            self._weights[name] = quantize(weight, bits, group_size, name=name)
            return None
        experts = model.get_submodule(path)
        if path not in self._experts:
            self._experts[path] = empty_experts(sizes_of(experts), bits, group_size)
        _write(experts, self._experts[path], leaf, weight, name)
        return None

    def install(self, model: PreTrainedModel) -> None:
        """Put the packed weights into a model whose other weights are loaded, and leave it."""
        self._make_head(model)
        for path, experts in experts_modules(model).items():
            if f"{path}.down_proj" in self._weights:
                self._experts[path] = self._from_stacks(path, experts)
            if path in self._experts:
                install_experts(experts, self._experts[path])
        for name, weight in self._weights.items():
            install_linear(model, name.rpartition(".")[0], weight)
        head = head_name(model)
        if f"{head}.weight" in self._weights:  # or tie_weights would put the embedding there again
            say_tied(model.config, tied=False)
            model.all_tied_weights_keys.pop(f"{head}.weight", None)
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)

    def _take_record(
        self, model: PreTrainedModel, name: str, record: Tensor, shape: torch.Size
    ) -> Tensor | None:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        packed = pack_record(record, name)
        if packed.shape != tuple(shape):
            raise wrong_shape(name, packed.shape, tuple(shape))
        if leaf in STACKS and hasattr(module, "is_transposed"):
            if not in_rows(module):
                fix = "open the original with bits instead"
                raise ExpertlyError("E306", name, "this family's experts lie otherwise", fix=fix)
        elif type(module) is not nn.Linear:
            return dequantize(packed, model.get_parameter(name).dtype)
        self._weights[name] = packed
        return None

    def _from_stacks(self, path: str, experts: Any) -> PackedExperts:
        """A layer's experts whose stacks came packed."""
        size = sizes_of(experts)
        up = self._weights.pop(f"{path}.{'gate_up_proj' if size.gated else 'up_proj'}")
        down = self._weights.pop(f"{path}.down_proj")
        biases = [torch.zeros(p.shape[:2]) if size.biased else None for p in (up, down)]
        return PackedExperts(up, down, *biases, hidden=size.hidden, gated=size.gated)

    def _make_head(self, model: PreTrainedModel) -> None:
        """Beside an embedding that is also the head, a packed head of its own."""
        if self._tied_head is None:
            return
        path, (bits, group_size) = self._tied_head
        name = f"{path}.weight"
        self._weights[name] = quantize(model.get_parameter(name), bits, group_size, name=name)


def register_packer() -> None:
    """Make the quantizer known to transformers, once."""
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_METHOD)(Packer)


def wrong_shape(name: str, found: tuple[int, ...], asked: tuple[int, ...]) -> ExpertlyError:
    """E301 for weights and config.json that are not of the same model."""
    why = f"its shape is {found}, config.json asks for {asked}"
    return ExpertlyError("E301", name, why, fix="copy the folder again")


class _Take(ConversionOps):
    """The last step of a weight's way into the model: to the packer instead."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        left = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            try:
                kept = self._packer.take(model, name, weight)
            except ExpertlyError as error:
                raise Refused(error) from error
            if kept is None:
                missing_keys.discard(name)
            else:
                left[name] = kept
        return left


def _write(experts: Any, packed: PackedExperts, leaf: str, weight: Tensor, name: str) -> None:
    """Pack a stack that comes in the family's layout. Raises E301 with the stack's name."""
    rows = weight.mT if experts.is_transposed else weight
    parts = {"down": rows} if leaf == "down_proj" else split_gate(experts, rows)
    for part, matrix in parts.items():
        try:
            packed.write(part, matrix)
        except ExpertlyError as error:
            why = f"{error.what}: {error.why}"
            raise ExpertlyError(error.code, name, why, fix=error.fix) from error
