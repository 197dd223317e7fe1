"""A policy on disk: in stock config keys where they can say it, beside the weights where not."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import require_family, stock_keys
from expertly.models.attach import Attachment, attach
from expertly.moe.policy import NEEDS_BIAS, Policy

POLICY = Path("expertly") / "policy.safetensors"


class SavedPolicy(NamedTuple):
    """A policy that stock loaders do not know, and its bias per MoE layer."""

    policy: Policy
    bias: list[Tensor]  # (experts,) each; empty when the rule has none


def stock_form(config: Mapping[str, Any], policy: Policy) -> dict[str, Any] | None:
    """The config keys that make a stock loader compute this policy; None when none can.

    What only steers training (jitter, capacity, a random second expert) is no part of it.
    """
    row = require_family(config)
    plain = policy.at_inference()
    if plain.router in NEEDS_BIAS and row.bias is None:
        return None
    return stock_keys(row, plain.router, plain.top_k, plain.options)


def require_sayable(config: Mapping[str, Any], policy: Policy, *, allow_non_stock: bool) -> bool:
    """Whether stock keys say the policy; E204 when they don't and that was not allowed."""
    stock = stock_form(config, policy) is not None
    if not stock and not allow_non_stock:
        why = f"{config['model_type']}'s config cannot say it, stock loaders would compute"
        raise ExpertlyError(
            "E204",
            f"router {policy.router}",
            f"{why} another function",
            fix="set router.allow_non_stock=true, or choose the family's own router",
        )
    return stock


def write_policy(folder: Path, attachment: Attachment) -> None:
    """Write a non-stock policy and its biases into a model folder."""
    assert attachment.policy is not None
    (folder / POLICY).parent.mkdir(exist_ok=True)
    plain = json.dumps(asdict(attachment.policy.at_inference()))
    bias = {f"bias.{i}": b.cpu() for i, b in enumerate(attachment.bias) if b is not None}
    save_file(bias or {"empty": torch.zeros(1)}, folder / POLICY, metadata={"policy": plain})


def read_policy(folder: Path) -> SavedPolicy | None:
    """The non-stock policy of a model folder, if it has one."""
    if not (folder / POLICY).is_file():
        return None
    with safe_open(folder / POLICY, framework="pt") as file:
        said = json.loads(file.metadata()["policy"])
        names = sorted(n for n in file.keys() if n.startswith("bias."))  # noqa: SIM118
        names.sort(key=lambda name: int(name.split(".")[1]))
        bias = [file.get_tensor(name) for name in names]
    known = {field.name for field in fields(Policy)}
    return SavedPolicy(Policy(**{k: v for k, v in said.items() if k in known}), bias)


def attach_saved(model: PreTrainedModel, saved: SavedPolicy) -> Attachment:
    """Attach a policy that was read from disk, with its biases."""
    attachment = attach(model, saved.policy)
    fill_bias(attachment, saved)
    return attachment


def fill_bias(attachment: Attachment, saved: SavedPolicy) -> None:
    """Copy the saved biases into the attached ones, for as far as both have them."""
    for target, bias in zip(attachment.bias, saved.bias, strict=False):
        if target is not None:
            target.copy_(bias)
