"""The Shape of a Switch Transformer: T5's encoder and decoder, with top-1 experts in some layers.

Sizes have names of their own, layers are sparse by a step, and feed-forwards have two matrices
(arXiv 2101.03961; transformers' SwitchTransformersForConditionalGeneration).
"""

from collections.abc import Mapping
from typing import Any

from expertly.plan.numbers import whole
from expertly.plan.shape import Attention, FeedForward, Layer, Shape

Config = Mapping[str, Any]
_NOTE = "an encoder-decoder: its cache is the decoder's own, without keys and values of the source"


def switch_shape(config: Config, name: str) -> Shape:
    """A Switch config's Shape. Raises E305 for a size that is missing, or is none."""
    dim, vocab = whole(config, "d_model"), whole(config, "vocab_size")
    tied = config.get("tie_word_embeddings") is not False
    layers = whole(config, "num_layers", most=10_000)
    config = {"num_decoder_layers": layers, **config}
    return Shape(
        name=name,
        family=config["model_type"],
        dim=dim,
        vocab=vocab,
        encoder=_stack(config, layers, "num_sparse_encoder_layers", attentions=1),
        layers=_stack(
            config,
            whole(config, "num_decoder_layers", most=10_000),
            "num_sparse_decoder_layers",
            attentions=2,
        ),
        embeddings=vocab * dim * (1 if tied else 3),  # untied, each stack has its own beside them
        head=0 if tied else vocab * dim,
        norms=2 * dim,
        gated=False,
        notes=(_NOTE,),
    )


def _stack(config: Config, layers: int, sparse_key: str, attentions: int) -> tuple[Layer, ...]:
    """One of the two stacks; the decoder's layers have a second attention, to the source."""
    dim, heads = whole(config, "d_model"), whole(config, "num_heads")
    inner = heads * whole(config, "d_kv")
    sparse = whole(config, sparse_key, default=3, least=0)
    step = layers // sparse if sparse else layers
    attention = Attention(
        weights=attentions * 4 * dim * inner,
        width=inner,
        cache=2 * inner if attentions == 2 else 0,
        shards=heads,
        pair=2 * inner,
    )
    buckets = heads * whole(config, "relative_attention_num_buckets", default=32)
    first = Attention(**{**vars(attention), "weights": attention.weights + buckets})
    return tuple(
        Layer(
            attention=attention if index else first,
            feed_forward=_network(config, step == 1 or (step > 0 and index % step == 1)),
            norms=(attentions + 1) * dim,
        )
        for index in range(layers)
    )


def _network(config: Config, sparse: bool) -> FeedForward:
    dim, width = whole(config, "d_model"), whole(config, "d_ff")
    if not sparse:
        return FeedForward(dense=2 * dim * width, width=width)
    experts = whole(config, "num_experts")
    return FeedForward(
        router=experts * (dim + bool(config.get("router_bias"))),
        expert=2 * dim * width,
        expert_width=width,
        experts=experts,
        top_k=1,
    )
