"""A model with random weights at real sizes, never held twice; and a tiny one of the same make."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES, family_of, num_layers, sizes
from expertly.models.build import ModelShape, build_model, model_config
from expertly.models.loading import Model, as_folder, open_config

_BLOCK = 2**22 - 3  # random numbers that repeat, out of step with the rows of any matrix
_STD = 0.02
_NARROW = 32  # of which packed weights make groups
# sizes that make no difference to how many calls a step makes, and what they become
_WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner"), _NARROW),
    **dict.fromkeys(("num_attention_heads", "n_head"), 2),
    "num_key_value_heads": 2,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), _NARROW),
    "qk_nope_head_dim": 16,
    **dict.fromkeys(("head_dim", "qk_rope_head_dim"), 32),  # which DeepSeek says twice
    "vocab_size": 256,
}
_PLAIN = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def random_model(raw: Mapping[str, Any], dtype: torch.dtype, layers: int | None = None) -> Model:
    """The model of a config.json with random weights, on the CPU, in evaluation mode.

    layers: how many of its first ones; None: all. Raises what open_config raises, E202 for sizes
    that its class cannot make a model of.
    """
    model = meta_model(raw, dtype, layers)
    materialise(model)
    return model.eval()


def meta_model(raw: Mapping[str, Any], dtype: torch.dtype, layers: int | None = None) -> Model:
    """The same without weights, on the meta device."""
    config = _config(raw)
    config.dtype = dtype
    with torch.device("meta"):
        model = build_model(config)
    if layers is not None:
        _keep_layers(model, layers)
    return model


def tiny_model(
    raw: Mapping[str, Any],
    dtype: torch.dtype,
    layers: int,
    make: Callable[..., Model] = random_model,
) -> Model:
    """A model that makes the same calls as that of a config.json, on matrices that are nothing.

    The same class, experts and top_k; where its class refuses such widths, another class stands in.
    make: as random_model, for a model of another kind. Raises what open_config raises.
    """
    _config(raw)  # what is wrong with it is not the tiny widths' fault
    tiny = {**raw, **_small(raw)}
    if (row := family_of(raw)) and row.nested:
        tiny[row.nested] = {**tiny[row.nested], **_small(tiny[row.nested])}
    try:
        model = make(tiny, dtype, layers)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except (ExpertlyError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return make(_stand_in(raw, layers).to_dict(), dtype)
    return model


def _config(raw: Mapping[str, Any]) -> ModelShape:
    """What transformers reads from such a config.json; a quantised checkpoint's without that."""
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    with as_folder(plain) as folder:
        return open_config(folder)


def _keep_layers(model: Model, layers: int) -> None:
    """Cut a model after its first layers, on the meta device where that costs nothing."""
    whole = num_layers(model.config.to_dict())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ModuleList) and len(module) == whole and name.count(".") < 4:
            model.set_submodule(name, module[:layers])
            return


def materialise(model: Model, leave: Collection[int] = ()) -> None:
    """Give a model on the meta device real weights, each tensor once and every page of it touched.

    Large ones are filled from one block of normal numbers, which is much faster than drawing them;
    for the rest, and for buffers, the class knows what they start as. leave: ids of parameters that
    stay where they are.
    """
    numbers = Numbers(model)
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None or not old.is_meta or id(old) in leave:
                continue
            if id(old) not in made:
                made[id(old)] = new = torch.zeros_like(old, device="cpu")
                if isinstance(old, nn.Parameter):
                    made[id(old)] = new = nn.Parameter(new, requires_grad=old.requires_grad)
                if old.numel() > _BLOCK:
                    numbers.fill(new.data.view(-1))
                    new._is_hf_initialized = True  # type: ignore[attr-defined]  # left alone
            setattr(module, name, made[id(old)])
    model.init_weights()


class Numbers:
    """Normal numbers as wide as a model's weights at their start, the same ones again and again."""

    def __init__(self, model: Model):
        std = getattr(model.config, "initializer_range", None) or _STD
        drawn = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
        self._block, self._offset = (drawn * std).to(model.dtype), 0

    def fill(self, target: Tensor) -> None:
        """Fill a vector; the next one goes on where it ends."""
        done, block = 0, self._block
        while done < len(target):
            piece = block[self._offset : self._offset + len(target) - done]
            target[done : done + len(piece)].copy_(piece)
            done += len(piece)
            self._offset = (self._offset + len(piece)) % len(block)

    def matrix(self, rows: int, width: int) -> Tensor:
        """A new matrix of them."""
        made = torch.empty(rows, width, dtype=self._block.dtype)
        self.fill(made.view(-1))
        return made


def _small(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config's widths, as small as they go."""
    row = FAMILIES.get(str(raw.get("model_type")))
    own = (row.expert_width, row.dense_width, row.shared_width) if row else ()
    widths = {**_WIDTHS, **{key: _NARROW for key in own if key}}
    return {key: small for key, small in widths.items() if type(raw.get(key)) is int}


def _stand_in(raw: Mapping[str, Any], layers: int) -> ModelShape:
    """A config of a plain class with as many layers and experts."""
    given = {**{key: _WIDTHS[key] for key in _PLAIN}, "num_hidden_layers": layers}
    if family_of(raw) is None:
        return model_config("qwen3", given)
    moe = sizes(raw)
    experts = {"num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
    return model_config("qwen3_moe", {**given, **experts, "moe_intermediate_size": _NARROW})
