"""What experts on other devices cost: all-to-all between GPUs, and offload to RAM or disk."""

from dataclasses import dataclass
from math import comb

from expertly.errors import ExpertlyError
from expertly.plan.hardware import Device, Link
from expertly.plan.precision import Precision, weight_bytes
from expertly.plan.shape import Layer, Shape
from expertly.plan.speed import decode
from expertly.plan.touched import experts_touched


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Expert parallelism's traffic in one step."""

    link: Link
    bytes_per_token_layer: float  # leaving a rank, mean of the MoE layers, forward
    seconds: float  # of a step, over all layers


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Decoding while the experts lie in RAM or on a disk, and the device caches some."""

    bytes_per_token: float  # over the link
    slow: float  # tokens per second: experts are loaded, then computed
    fast: float  # loads hide behind compute, or compute behind loads
    hit_rate: float  # per request of a layer for an expert, not per token


def all_to_all_bytes(
    layer: Layer,
    dim: int,
    ranks: int,
    *,
    dispatch: float = 2,
    combine: float = 2,
    deduplicated: bool = True,
) -> float:
    """Bytes that leave a rank for each token of an MoE layer, there and back, in a forward pass.

    dispatch, combine: bytes per element on the way there (2 bf16, 1 fp8) and back. deduplicated:
    a token goes to a rank once, however many of its experts are there, and one sum comes back;
    otherwise once per expert. Routing is taken to be even, and free to choose any rank.
    Raises E208 for ranks that do not divide the experts.
    """
    moe = layer.feed_forward
    if not moe.experts:
        return 0.0
    if ranks < 1 or moe.experts % ranks:
        why = f"{ranks} does not divide {moe.experts} experts"
        raise ExpertlyError("E208", "ranks", why, fix=f"choose a divisor of {moe.experts}")
    # the chance that all of a token's experts are on other ranks than a given one
    passed_by = comb(moe.experts - moe.experts // ranks, moe.top_k) / comb(moe.experts, moe.top_k)
    copies = (ranks - 1) * (1 - passed_by) if deduplicated else moe.top_k * (ranks - 1) / ranks
    return copies * dim * (dispatch + combine)


def all_to_all(
    shape: Shape,
    link: Link,
    *,
    ranks: int,
    tokens: float,
    passes: int = 1,
    imbalance: float = 1.0,
) -> AllToAll:
    """The all-to-alls of a step of `tokens` tokens on each rank, each element in bf16.

    passes: 2 where the step trains, 3 where it also computes the forward pass again; each sends
    as much. imbalance: what the fullest rank has to send over the mean; the others wait for it.
    """
    sizes = [all_to_all_bytes(layer, shape.dim, ranks) for layer in shape.moe_layers]
    once = sum(
        2 * link.latency + imbalance * tokens * size / link.bandwidth for size in sizes if size
    )
    return AllToAll(
        link=link,
        bytes_per_token_layer=sum(sizes) / max(len(sizes), 1),
        seconds=once * passes,
    )


def offload(
    shape: Shape,
    precision: Precision,
    device: Device,
    *,
    hit_rate: float,
    batch: int = 1,
    context: int = 4096,
    kv_bits: float = 16,
    gpus: int = 1,
) -> Offload:
    """Decoding with the routed experts behind the host's link and a cache of them on the device.

    Of several GPUs each loads its share of every expert, over a link of its own.
    hit_rate: the share of requests that find their expert there; a request is one layer's need
    of one of the distinct experts that its tokens chose. 0 keeps no expert at hand, 1 all.
    Raises E208 for a hit rate that is no share.
    """
    if not 0 <= hit_rate <= 1:
        why = f"is {hit_rate:g}, not from 0 to 1"
        raise ExpertlyError("E208", "hit rate", why, fix="give the share of requests, as 0.6")
    loads = [
        ((1 - hit_rate) * experts_touched(moe.experts, moe.top_k, batch), moe.expert)
        for moe in (layer.feed_forward for layer in shape.layers)
    ]
    size = weight_bytes(sum(misses * expert for misses, expert in loads), precision["experts"])
    link = device.host_link
    loading = size / (link.bandwidth * gpus) + link.latency * sum(misses for misses, _ in loads)
    step = decode(
        shape, precision, device, batch=batch, context=context, kv_bits=kv_bits, gpus=gpus
    ).seconds
    return Offload(
        bytes_per_token=size / batch,
        slow=batch / (step + loading),
        fast=batch / max(step, loading),
        hit_rate=hit_rate,
    )
