"""Give a model another routing policy, see what it decides, and take it out again.

Run: python examples/routing_policy.py [MODEL_FOLDER]; without a folder a tiny random Mixtral.
"""

import sys

import torch

import expertly
from expertly.models.build import build_model, model_config

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def main() -> None:
    if len(sys.argv) > 1:
        model = expertly.open_model(sys.argv[1])
    else:
        model = build_model(model_config("mixtral", SIZES)).eval()
    ids = torch.arange(32).unsqueeze(0)
    before = model(ids).logits

    narrow = expertly.Policy(router="softmax_topk", top_k=1, options={"renormalize": False})
    with expertly.attach(model, narrow) as attachment:
        changed = model(ids).logits
        for layer, decision in zip(attachment.layers, attachment.decisions, strict=True):
            print(f"{layer.name}: first tokens go to {decision.served.experts[:6, 0].tolist()}")

    print(f"largest change of a logit with one expert: {(changed - before).abs().max():.4f}")
    print(f"and after detaching: {(model(ids).logits - before).abs().max():.4f}")


if __name__ == "__main__":
    main()
