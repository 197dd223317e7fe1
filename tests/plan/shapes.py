"""A small Shape made by hand."""

from expertly.plan.shape import Attention, FeedForward, Layer, Shape

TINY = Shape(
    name="tiny",
    family="mixtral",
    dim=64,
    vocab=1000,
    layers=4
    * (
        Layer(
            attention=Attention(weights=4 * 64 * 64, width=64, cache=2 * 64, pair=2 * 64),
            feed_forward=FeedForward(
                router=8 * 64, expert=3 * 64 * 32, expert_width=32, experts=8, top_k=2
            ),
            norms=128,
        ),
    ),
    embeddings=64000,
    head=64000,
    norms=64,
)
