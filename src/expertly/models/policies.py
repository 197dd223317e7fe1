"""A policy on disk: in stock config keys where they can say it, beside the weights where not."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import require_family, stock_keys
from expertly.models.attach import Attachment, attach
from expertly.models.layers import own_policy
from expertly.moe.policy import Policy, rule_defaults
from expertly.moe.routing import ROUTERS

POLICY = Path("expertly") / "policy.safetensors"

_ROUNDING = ("ordered", "of_all")  # options that only say in which order a family computes
_BAD_FILE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)


class SavedPolicy(NamedTuple):
    """A policy that stock loaders do not know, and its bias per MoE layer."""

    policy: Policy
    bias: list[Tensor]  # (experts,) each; empty when the rule has none


def stock_form(config: Mapping[str, Any], policy: Policy) -> dict[str, Any] | None:
    """The config keys that make a stock loader compute this policy; None when none can.

    What only steers training (jitter, capacity, a random second expert) is no part of it.
    """
    plain = policy.at_inference()
    row = require_family(config)
    if ROUTERS[plain.router].biased and row.bias is None:
        return None
    if row.unless and plain.top_k != own_policy(config).top_k:
        return None  # the layers that no rule chooses for would follow the key, too
    for keys in stock_keys(config, plain.top_k, _in_full(plain)):
        said = own_policy({**config, **keys}).at_inference()
        if (said.router, said.top_k, _in_full(said)) == (
            plain.router,
            plain.top_k,
            _in_full(plain),
        ):
            return keys
    return None


def require_sayable(config: Mapping[str, Any], policy: Policy, *, allow_non_stock: bool) -> bool:
    """Whether stock keys say the policy; E204 when they don't and that was not allowed."""
    stock = stock_form(config, policy) is not None
    if not stock and not allow_non_stock:
        why = f"{config['model_type']}'s config cannot say it, stock loaders would compute"
        raise ExpertlyError(
            "E204",
            f"router {policy.router}",
            f"{why} another function",
            fix="set router.allow_non_stock=true (Python: allow_non_stock=True), or choose the "
            "family's own router",
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
    """The non-stock policy of a model folder, if it has one. Raises E301 for a damaged file."""
    if not (folder / POLICY).is_file():
        return None
    try:
        with safe_open(folder / POLICY, framework="pt") as file:
            said = json.loads(file.metadata()["policy"])
            numbers = sorted(int(n[5:]) for n in file.keys() if n.startswith("bias."))  # noqa: SIM118
            bias = [file.get_tensor(f"bias.{number}") for number in numbers]
        known = {field.name for field in fields(Policy)}
        policy = Policy(**{key: value for key, value in said.items() if key in known})
        if type(policy.top_k) is not int or not isinstance(policy.options, dict):
            raise ValueError("a value of the wrong type")
    except _BAD_FILE as error:
        why = f"is not a policy ({error!r})"[:200]
        fix = "copy the folder again"
        raise ExpertlyError("E301", str(folder / POLICY), why, fix=fix) from error
    return SavedPolicy(policy, bias)


def attach_saved(model: PreTrainedModel, saved: SavedPolicy) -> Attachment:
    """Attach a policy that was read from disk, with its biases."""
    attachment = attach(model, saved.policy)
    fill_bias(attachment, saved)
    return attachment


def fill_bias(attachment: Attachment, saved: SavedPolicy) -> None:
    """Copy the saved biases into the attached ones, where both rules have them.

    Raises E301 when they are of another model.
    """
    targets = [bias for bias in attachment.bias if bias is not None]
    if not targets or not saved.bias:
        return
    if [bias.shape for bias in saved.bias] != [bias.shape for bias in targets]:
        why = "its biases do not fit the model's experts"
        raise ExpertlyError("E301", str(POLICY), why, fix="copy the folder again")
    for target, bias in zip(targets, saved.bias, strict=True):
        target.copy_(bias)


def _in_full(policy: Policy) -> dict[str, Any]:
    """The policy's options with the rule's defaults, which a config may contradict.

    Without those that change nothing but rounding.
    """
    full = {**rule_defaults(ROUTERS[policy.router]), **policy.options}
    return {name: value for name, value in full.items() if name not in _ROUNDING}
