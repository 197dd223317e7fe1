"""Adapters for the tests: beside tiny models, ours and stock PEFT's."""

import torch
from dense_of import write_dense
from packed_models import model_of, saved
from peft import PeftModel
from transformers import AutoModelForCausalLM

from expertly.models.adapter_files import save_adapter
from expertly.models.adapters import AdapterSpec, add_adapter
from expertly.models.loading import load_weights


def folder_of(family, root):
    """A tiny dense model's folder, of weights that do not blow differences up."""
    return saved(model_of(family, initializer_range=0.05), root / family)


def adapted(folder, *, bits=None, targets=("experts", "attention"), r=4):
    """A model with adapters whose numbers are all but nothing."""
    model = load_weights(folder, dtype=torch.float32, bits=bits)
    add_adapter(model, AdapterSpec(r=r, lora_alpha=2.0 * r, targets=targets))
    return filled(model)


@torch.no_grad()
def filled(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)
    return model


def saved_adapter(model, base, root, **options):
    target = root / "adapter"
    target.mkdir()
    save_adapter(model, target, base=base, **options)
    return target


def stock(adapter, base, ours):
    """PEFT's own model of an adapter; beside the numbers that our packed weights stand for."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    write_dense(ours, dense)
    return PeftModel.from_pretrained(dense, str(adapter), is_trainable=True)


def learnt(model, ids):
    """Logits, and every gradient by a parameter's name in the base."""
    logits = model(ids).logits
    logits.square().mean().backward()
    return logits.detach(), {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
