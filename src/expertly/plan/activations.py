"""What autograd saves for the backward pass, in bytes per token.

Of transformers' blocks with fused attention and our experts function, tensor by tensor; tests
compare it with what torch really saves. width: bytes of an element, 2 or 4.
"""

from expertly.plan.memory import keys_and_values, queries
from expertly.plan.shape import Layer, Shape

_FLOAT = 4  # norms and routers compute in fp32, whatever the weights are in


def saved(shape: Shape, width: int, *, tp: int = 1, checkpointing: bool = False) -> float:
    """Bytes that a model saves for a token, without its routed experts and its loss.

    Checkpointing keeps each layer's input, and all of the one that is being computed again.
    """
    last = shape.dim * (_FLOAT + 2 * width)  # the norm before the head
    kinds = shape.kinds
    layers = {layer: _of_layer(layer, shape, width, tp) for layer in kinds}
    if not checkpointing:
        return last + sum(kinds[layer] * size for layer, size in layers.items())
    return last + len(shape.blocks) * shape.dim * width + max(layers.values(), default=0)


def saved_by_experts(
    shape: Shape,
    width: int,
    *,
    ep: int = 1,
    tp: int = 1,
    checkpointing: bool = False,
    imbalance: float = 1.0,
) -> float:
    """Bytes that a token's routed experts save: of all layers, or with checkpointing of one.

    With ep > 1 also what is sent and received.
    """
    kinds = shape.kinds
    layers = {layer: _of_experts(layer, shape, ep, tp) for layer in kinds}
    if checkpointing:
        kept = max(layers.values(), default=0)
    else:
        kept = sum(kinds[layer] * elements for layer, elements in layers.items())
    if ep == 1:
        return kept * width
    sent = max((layer.feed_forward.top_k for layer in kinds), default=0) * 2 * shape.dim
    return (kept * imbalance + sent / tp) * width


def _of_layer(layer: Layer, shape: Shape, width: int, tp: int = 1) -> float:
    """Bytes that one layer saves for each token, but for its routed experts.

    A norm saves its input in fp32, the normed and the scaled; attention (without a matrix of
    scores) queries, keys, values and answers; a gated network gate, up, the activated gate and the
    product; a router its fp32 probabilities and its choices.
    """
    attention, moe = layer.attention, layer.feed_forward
    norms = shape.dim * _norms(layer, shape) * (_FLOAT + 2 * width)
    attended = queries(layer) + keys_and_values(layer) + attention.width
    split = attended * width + _normed_inside(layer) * (_FLOAT + width)
    split += _tensors(shape) * moe.width * width
    return norms + split / tp + _FLOAT * moe.experts + 16 * moe.top_k


def _of_experts(layer: Layer, shape: Shape, ep: int, tp: int) -> float:
    """Elements that a layer's experts save for a token: its copies, inner results and answers.

    GPUs that share tensors have the same tokens: they split the experts' width, or the tokens.
    """
    moe = layer.feed_forward
    ends, inside = 2 * shape.dim, _tensors(shape) * moe.expert_width / tp
    return moe.top_k * (ends + inside if ep == 1 else ends / tp + inside)


def _tensors(shape: Shape) -> int:
    """How many tensors as wide as itself a feed-forward saves."""
    return 4 if shape.gated else 2


def _norms(layer: Layer, shape: Shape) -> float:
    """How many norms of the model's width a layer has; with biases they are larger everywhere."""
    one = shape.norms / (2 if shape.encoder else 1)
    return layer.norms / one if one else 2


def _normed_inside(layer: Layer) -> float:
    """Elements of a token that are normed within attention: a latent, or queries and keys."""
    attention = layer.attention
    if attention.absorbed or not attention.norms:
        return attention.norms
    return queries(layer) + attention.cache / 2
