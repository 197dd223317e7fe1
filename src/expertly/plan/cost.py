"""What training and serving cost: GPU-hours, money and energy, from FLOPs and tokens a second."""

from dataclasses import dataclass

from expertly.errors import ExpertlyError
from expertly.plan.hardware import Device, flops_at
from expertly.plan.memory import require

UTILISATION = 0.4  # of the bf16 peak; what large dense runs reach, MoE runs often less
_LEAST = 1e-12  # below it, hours are beyond all numbers
_HOUR = 3600
_KILO = 1000


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """FLOPs and what they cost; None where the device has no price, or no watts."""

    flops: float
    gpu_hours: float
    utilisation: float  # of the device's bf16 peak
    usd: float | None
    kwh: float | None  # at full power, of the GPUs alone


@dataclass(frozen=True, kw_only=True)
class ServingCost:
    """What a million tokens cost; None where the device has no price, or no watts."""

    usd_per_million: float | None
    kwh_per_million: float | None


def training_cost(
    flops: float,
    device: Device,
    *,
    utilisation: float | None = None,
    gpu_hours: float | None = None,
    price: float | None = None,
) -> TrainingCost:
    """What `flops` cost on a device, at a utilisation of its bf16 peak (0.4 if none is said).

    With gpu_hours given, the utilisation that they imply comes out. price: USD per GPU and hour;
    None: the device's. Raises E208 for both at once, or for a utilisation that is not in (0, 1].
    """
    require("--flops", flops, 0, most=1e40)
    _check_price(price)
    peak = flops_at(device, "bf16") * _HOUR  # FLOPs of one GPU in an hour
    if gpu_hours is None:
        utilisation = UTILISATION if utilisation is None else utilisation
        _check_utilisation(utilisation, "--utilisation")
        gpu_hours = flops / (peak * utilisation)
    elif utilisation is not None:
        why = "is said beside --gpu-hours, which imply one"
        raise ExpertlyError("E208", "--utilisation", why, fix="leave out one of the two")
    else:
        require("--gpu-hours", gpu_hours, 1e-9)
        utilisation = flops / (peak * gpu_hours)
        _check_utilisation(utilisation, "--gpu-hours")
    return TrainingCost(
        flops=flops,
        gpu_hours=gpu_hours,
        utilisation=utilisation,
        usd=_times(gpu_hours, device.usd_per_hour if price is None else price),
        kwh=_times(gpu_hours / _KILO, device.watts),
    )


def serving_cost(
    tokens_per_second: float, device: Device, gpus: int = 1, price: float | None = None
) -> ServingCost:
    """What a million tokens cost when `gpus` devices make so many a second together.

    price: USD per GPU and hour; None: the device's. Raises E208 for a rate, a number of GPUs or a
    price out of range.
    """
    require("--tokens-per-second", tokens_per_second, 1e-9)
    require("--gpus", gpus, 1)
    _check_price(price)
    hours = gpus * 1e6 / tokens_per_second / _HOUR
    return ServingCost(
        usd_per_million=_times(hours, device.usd_per_hour if price is None else price),
        kwh_per_million=_times(hours / _KILO, device.watts),
    )


def _check_price(price: float | None) -> None:
    if price is not None:
        require("--price", price, 0)


def _check_utilisation(utilisation: float, flag: str) -> None:
    """Raises E208 for a share of the peak that no run has; flag: whence it comes."""
    if not _LEAST <= utilisation <= 1:
        why = f"utilisation {utilisation:.3g} of the bf16 peak, expected above 0, at most 1"
        raise ExpertlyError("E208", flag, why, fix=f"correct {flag}")


def _times(number: float, each: float | None) -> float | None:
    return None if each is None else number * each
