"""A small Shape made by hand, and what it takes to ask for advice."""

from dataclasses import replace

from expertly.plan.advice import facts_of
from expertly.plan.hardware import device_of, link_of
from expertly.plan.known import shape_of
from expertly.plan.options import Need
from expertly.plan.precision import precision
from expertly.plan.shape import Attention, FeedForward, Layer, Shape, total

ATTENTION = Attention(weights=4 * 64 * 64, width=64, cache=2 * 64, pair=2 * 64)
MOE = FeedForward(router=8 * 64, expert=3 * 64 * 32, expert_width=32, experts=8, top_k=2)
LAYER = Layer(attention=ATTENTION, feed_forward=MOE, norms=128)
TINY = Shape(
    name="tiny",
    family="mixtral",
    dim=64,
    vocab=1000,
    layers=(LAYER,) * 4,
    embeddings=64000,
    head=64000,
    norms=64,
)


def need_for(shape, gpu="4090", gpus=1, bits=None, host_link=None, **changes):
    device = device_of(gpu)
    if host_link:
        device = replace(device, host_link=link_of(host_link))
    device = replace(device, memory=changes.pop("memory", device.memory))
    return Need(device=device, precision=precision(shape, None, bits), gpus=gpus, **changes)


def facts(name="mixtral-8x7b", *machine, vs=None, tokens=None, bits=None, **changes):
    shape = shape_of(name)
    need = need_for(shape, *machine, bits=bits, **changes)
    trained = usual_tokens(shape)
    dense = shape_of(vs) if vs else None
    return facts_of(shape, dense, need, train_tokens=trained, tokens=tokens)


def usual_tokens(shape):
    """20 for every active parameter."""
    return 20 * total(shape).active
