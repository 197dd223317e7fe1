"""How long a training step takes at best: compute, and what GPUs send each other."""

from dataclasses import dataclass

from expertly.plan.cost import UTILISATION
from expertly.plan.hardware import MACHINE, Device, between, flops_at
from expertly.plan.precision import Precision, weights
from expertly.plan.shape import Shape
from expertly.plan.states import below_adapters, layer_states, root, states, together
from expertly.plan.traffic import all_to_all
from expertly.plan.training import ALONE, IMBALANCE, Layout, check, flops_per_token

_ADAMW = 28  # bytes of a trained weight that its update reads and writes: all states, both ways


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One step of AdamW: each FSDP rank has its sequences, all GPUs take as long.

    FSDP and compute hide each other; all-to-all and all-reduces hide behind nothing.
    """

    tokens: float  # of all GPUs
    seconds: float
    by_part: dict[str, float]  # seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds


def training_step(
    shape: Shape,
    device: Device,
    *,
    layout: Layout = ALONE,
    method: str = "full",
    rank: int = 16,
    mixed: bool = True,
    checkpointing: bool = True,
    batch: int = 1,
    context: int = 4096,
    imbalance: float = IMBALANCE,
    utilisation: float = UTILISATION,
) -> TrainingStep:
    """A step of `batch` sequences of `context` tokens on each FSDP rank, forward and backward once.

    utilisation: how much of the peak (bf16; fp32 unless mixed) the FLOPs reach that are not
    computed again, as in `training_cost`; with 1 the times are the roofline, recomputation too.
    imbalance: of all-to-all, with ep > 1; compute is taken to be even. With adapters no
    gradients of frozen weights are computed; the adapters' own products are not counted. The
    rest is as in `training`. Raises E208 for a layout or a method that cannot be.
    """
    check(shape, layout, method)
    base, width = below_adapters(shape, method, mixed), 2 if mixed else 4
    tokens, again = batch * context, int(checkpointing)  # checkpointing repeats the forward pass
    passes = 2 + (method == "full") + again  # over the weights: forward, to inputs, to weights
    once = tokens * flops_per_token(shape, context=context) / layout.tp
    once /= flops_at(device, "bf16" if mixed else "fp32")
    reading = passes * _read(shape, base, tokens, layout) / device.bandwidth
    sent = all_to_all(
        shape,
        between(device, layout.ep),
        ranks=layout.ep,
        tokens=tokens / layout.tp,
        passes=2 + again,
        imbalance=imbalance,
    )
    trained = states(shape, method, rank, base).trained / layout.world
    parts = {
        "compute": max((passes - again) * once / utilisation, passes * once, reading),
        "fsdp": _sharding(shape, device, layout, method, rank, width, base),
        "all_to_all": sent.seconds,
        "tensor_parallel": (2 + again) * _all_reduces(shape, device, layout, tokens * width),
        "optimizer": _ADAMW * trained / device.bandwidth,
    }
    hidden = min(parts["compute"], parts["fsdp"])
    return TrainingStep(
        tokens=tokens * layout.fsdp, seconds=sum(parts.values()) - hidden, by_part=parts
    )


def _read(shape: Shape, base: Precision, tokens: float, layout: Layout) -> float:
    """Bytes of the weights that a GPU reads in one pass."""
    met = tokens * max(layout.ep / layout.tp, 1)  # tokens that choose among a GPU's experts
    read = {part: held.touched for part, held in weights(shape, base, met).items()}
    experts = read.pop("experts", 0.0)
    return sum(read.values()) / layout.tp + experts / layout.ways


def _sharding(
    shape: Shape,
    device: Device,
    layout: Layout,
    method: str,
    rank: int,
    width: int,
    base: Precision,
) -> float:
    """Seconds of what FSDP2 sends: two all-gathers of each layer and a reduce-scatter of gradients.

    A layer is gathered forward and backward; what is recomputed is then there already (the
    pre-backward hook of fully_shard). The root stays together after the forward pass. Each GPU
    receives all shares but its own; latency hides behind other layers.
    """
    dense, experts = together(root(shape, method, base), width, 1), 0.0
    for layer, many in shape.kinds.items():
        beside, routed = layer_states(layer, shape, method, rank, base)
        dense += many * together(beside, width, 2)
        experts += many * together(routed, width, 2)
    seconds = 0.0
    for size, ways in ((dense, layout.tp), (experts, layout.ways)):
        ranks = layout.world // ways  # those that have shards of the same weights
        received = (ranks - 1) / ranks * size / ways
        seconds += received / _ring(device, layout.world, ways)
    return seconds


def _ring(device: Device, gpus: int, apart: int) -> float:
    """Bytes per second that reach each GPU of a ring, of which every `apart`-th GPU is one.

    Between machines its GPUs of one machine share the traffic, with a network card each (NCCL).
    """
    if gpus <= MACHINE:
        return device.link.bandwidth
    return min(device.link.bandwidth, max(MACHINE // apart, 1) * device.network.bandwidth)


def _all_reduces(shape: Shape, device: Device, layout: Layout, size: float) -> float:
    """Seconds of tensor parallelism in one pass: two all-reduces per layer, of `size` bytes per
    element of the model's width.
    """
    if layout.tp == 1:
        return 0.0
    link, others = between(device, layout.tp), (layout.tp - 1) / layout.tp
    once = 2 * (link.latency + others * size * shape.dim / link.bandwidth)
    return 2 * len(shape.blocks) * once
