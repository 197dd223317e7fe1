"""A plan: every answer about one model on one kind of machine, in plain dicts that JSON can say.

The page and the JSON show the same numbers. docs/plan.md says what each key means.
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from expertly.plan.advice import advise, routing
from expertly.plan.cost import serving_cost
from expertly.plan.hardware import between
from expertly.plan.memory import CHUNK, kv_cache, kv_elements, kv_per_token
from expertly.plan.options import MOST_GPUS, asked, cached, fewest_gpus
from expertly.plan.precision import Precision, name_of, weights
from expertly.plan.question import Question, contenders, need, tokens_of
from expertly.plan.scaling import estimate
from expertly.plan.shape import Shape, parameters, total
from expertly.plan.speed import Step, batches_with, decode, fades_at, prefill, race
from expertly.plan.touched import experts_touched
from expertly.plan.traffic import offload
from expertly.plan.training import METHODS, flops_per_token
from expertly.plan.training_job import costs, traffic, training_gpus, training_of

Answer = dict[str, Any]


def plan(question: Question) -> Answer:
    """Answer all of it. Raises E208 for numbers that cannot be, E202 for none."""
    enough = fewest_gpus(question.shape, need(question, question.gpus or 1))
    # experts are put elsewhere where more devices are not to be had
    gpus = question.gpus or (1 if question.offloaded else enough or MOST_GPUS)
    return {
        **about(question.shape),
        **sizes(question.shape, question.precision, question.kv_bits),
        "memory": memory(question, gpus),
        "machine": machine(question, gpus, enough),
        "models": [column(question, gpus, *each) for each in contenders(question)],
        "kv_cache_against": caches(question),
        "decode": decoding(question, gpus),
        "offload": offloading(question, gpus),
        "all_to_all": traffic(question, gpus),
        "training": training_of(question),
        "cost": costs(question),
        "scaling_law": scaling(question),
        "verdict": asdict(
            advise(
                question.shape,
                question.against,
                need(question, gpus),
                train_tokens=tokens_of(question),
                tokens=question.tuning_tokens,
                dense_precision=question.against_precision,
            )
        ),
    }


def about(shape: Shape) -> Answer:
    """What kind of model it is."""
    moe = next((layer.feed_forward for layer in shape.moe_layers), None)
    return {
        "model": shape.name,
        "family": shape.family,
        "layers": len(shape.blocks),
        "moe_layers": len(shape.moe_layers),
        "experts": moe.experts if moe else 0,
        "top_k": moe.top_k if moe else 0,
        "max_context": shape.context,
        "notes": list(shape.notes),
    }


def sizes(shape: Shape, precision: Precision, kv_bits: float) -> Answer:
    """Parameters and bytes: all, and those that one token uses."""
    count, held = total(shape), weights(shape, precision)
    parts = {
        part: {"total": each.total, "active": each.active, "bytes": held[part].resident}
        for part, each in parameters(shape).items()
    }
    return {
        "parameters": {"total": count.total, "active": count.active, "by_part": parts},
        "precision": name_of(precision, shape),
        "weights_bytes": round(sum(each.resident for each in held.values())),
        "weights_bytes_touched": round(sum(each.touched for each in held.values())),
        "kv_cache_elements_per_token": kv_elements(shape),
        "kv_cache_bytes_per_token": kv_per_token(shape, kv_bits),
    }


def memory(question: Question, gpus: int) -> Answer:
    """What serving takes on all GPUs together: resident, and touched by a decode step."""
    held = asked(question.shape, need(question, gpus))
    said = {
        "context": question.context,
        "batch": question.batch,
        "kv_bits": question.kv_bits,
    }
    parts = ("weights", "kv_cache", "activations", "dispatch", "total")
    return said | {part: getattr(held, part)._asdict() for part in parts}


def machine(question: Question, gpus: int, enough: int | None) -> Answer:
    """What it is planned for."""
    return {
        "device": question.device.name,
        "gpus": gpus,
        "memory_bytes": question.device.memory,
        "gpus_needed": enough,
        "link": between(question.device, gpus).name,
        "source": question.device.source,
    }


def column(question: Question, gpus: int, role: str, shape: Shape, stored: Precision) -> Answer:
    """One model in a row of numbers, on the same GPUs as the others."""
    run = partial(decode, context=question.context, kv_bits=question.kv_bits, gpus=gpus)
    step = run(shape, stored, question.device, batch=question.batch)
    first = prefill(
        shape,
        stored,
        question.device,
        tokens=min(question.context, CHUNK),
        kv_bits=question.kv_bits,
        gpus=gpus,
    )
    held = sizes(shape, stored, question.kv_bits)
    parts = held["parameters"].pop("by_part")
    cache = kv_cache(shape, question.context, question.kv_bits, batch=question.batch, gpus=gpus)
    return {
        "role": role,
        "name": shape.name,
        **held,
        "bytes_by_part": {part: each["bytes"] for part, each in parts.items()}
        | {"KV cache": cache},
        "fits": fits(question, gpus, shape, stored, question.batch),
        "flops_per_token": flops_per_token(shape, context=question.context),
        "decode_tokens_per_second": step.tokens_per_second,
        "decode_seconds": step.seconds,
        **_cost(step, question, gpus),
        "prefill_tokens": first.tokens,
        "prefill_tokens_per_second": first.tokens_per_second,
        "train_gpus": {method: training_gpus(question, shape, method) for method in METHODS},
    }


def caches(question: Question) -> Answer | None:
    """How much of the named model's KV cache is saved: by make, and by bits against its 16."""
    if question.against is None:
        return None
    ours, theirs = kv_elements(question.shape), kv_elements(question.against)
    if not theirs:
        return None
    return {
        "name": question.against.name,
        "elements_per_token": theirs,
        "elements_saved": ours / theirs - 1,
        "bytes_saved": ours * question.kv_bits / (theirs * 16) - 1,
    }


def decoding(question: Question, gpus: int) -> Answer | None:
    """The MoE beside a dense model as the batch grows; None for a dense model alone."""
    shape = question.shape
    if not shape.moe_layers:
        return None
    _, dense, dense_precision = [*contenders(question)][-1]
    races = race(
        shape,
        dense,
        question.precision,
        question.device,
        dense_precision=dense_precision,
        batches=batches_with(question.batch),
        context=question.context,
        kv_bits=question.kv_bits,
        gpus=gpus,
    )
    moe = shape.moe_layers[0].feed_forward
    rows = [
        {
            "batch": each.batch,
            "experts_touched": experts_touched(moe.experts, moe.top_k, each.batch),
            "moe": _speed(each.moe, question, gpus)
            | {"fits": fits(question, gpus, shape, question.precision, each.batch)},
            "dense": _speed(each.dense, question, gpus)
            | {"fits": fits(question, gpus, dense, dense_precision, each.batch)},
            "speed_ratio": each.ratio,
            "bytes_ratio": each.bytes_ratio,
            "flops_ratio": each.flops_ratio,
        }
        for each in races
    ]
    return {
        "against": dense.name,
        "rows": rows,
        "fades_at": fades_at(races),
        "routing_tax": routing(shape, need(question, gpus)),
    }


def fits(question: Question, gpus: int, shape: Shape, stored: Precision, batch: int) -> bool:
    """Whether the GPUs hold a model with so many sequences."""
    here = replace(need(question, gpus), precision=stored, batch=batch)
    return asked(shape, here).total.resident <= here.room


def _speed(step: Step, question: Question, gpus: int) -> Answer:
    return {
        "tokens_per_second": step.tokens_per_second,
        "seconds": step.seconds,
        "sigma_seconds": step.sigma,
        **_cost(step, question, gpus),
    }


def _cost(step: Step, question: Question, gpus: int) -> Answer:
    """USD and kWh for a million tokens of such steps."""
    return asdict(serving_cost(step.tokens_per_second, question.device, gpus, question.price))


def offloading(question: Question, gpus: int) -> Answer | None:
    """Decoding with the experts behind a link; None where nobody asks, or there are none."""
    if not question.offloaded or not question.shape.moe_layers:
        return None
    hits = question.hit_rate
    if hits is None:
        hits = cached(question.shape, need(question, gpus))
    found = offload(
        question.shape,
        question.precision,
        question.device,
        hit_rate=hits,
        batch=question.batch,
        context=question.context,
        kv_bits=question.kv_bits,
        gpus=gpus,
    )
    return {"link": question.device.host_link.name, **asdict(found)}


def scaling(question: Question) -> Answer | None:
    """The scaling law's losses; None for a dense model."""
    if not question.shape.moe_layers:
        return None
    return asdict(estimate(question.shape, tokens_of(question)))
