"""What `expertly plan` prints: the same numbers as its JSON, for people."""

from collections.abc import Iterable, Mapping
from typing import Any

from expertly.cli.options import number, table
from expertly.plan.options import MOST_GPUS

Answer = Mapping[str, Any]
_BATCHES = (1, 4, 16, 64, 256, 1024)  # of the rows that are shown
_OPTIONS = 6
_BRACKETS = "; in (brackets): does not fit"


def page(found: Answer) -> str:
    """All sections, the verdict last: it is what the eye finds above the prompt."""
    sections = (
        _head(found),
        _parts(found),
        _memory(found),
        _models(found),
        _cache(found),
        _decode(found),
        _offload(found),
        _traffic(found),
        _training(found),
        _cost(found),
        _scaling(found),
        _verdict(found),
    )
    return "\n\n".join(section for section in sections if section)


def _head(found: Answer) -> str:
    said = [f"{found['family']}, {found['layers']} layers"]
    if found["experts"]:
        where = "each" if found["moe_layers"] == found["layers"] else str(found["moe_layers"])
        said.append(f"{found['experts']} experts in {where} of them, top {found['top_k']}")
    lines = [f"{found['model']}: {', '.join(said)}", *(f"! {note}" for note in found["notes"])]
    return "\n".join(lines)


def _parts(found: Answer) -> str:
    count = found["parameters"]
    rows = [["part", "parameters", "used per token", found["precision"]]]
    rows += [
        [part, number(each["total"]), number(each["active"]), size(each["bytes"])]
        for part, each in count["by_part"].items()
    ]
    rows.append(
        ["total", number(count["total"]), number(count["active"]), size(found["weights_bytes"])]
    )
    return table(rows)


def _memory(found: Answer) -> str:
    held, machine = found["memory"], found["machine"]
    head = f"memory, batch {held['batch']}, context {held['context']:,}"
    rows = [[head, "resident", "read per step"]]
    rows += [
        [name, size(held[key]["resident"]), size(held[key]["touched"])]
        for name, key in (
            ("weights", "weights"),
            (f"KV cache, {held['kv_bits']:g} bits", "kv_cache"),
            ("activations", "activations"),
            ("dispatch buffers", "dispatch"),
            ("total", "total"),
        )
    ]
    device, most = device_name(machine), f"more than {MOST_GPUS:,}"
    needed = machine["gpus_needed"] or most
    return f"{table(rows)}\nneeds {needed} x {device}; planned for {machine['gpus']}"


def _models(found: Answer) -> str:
    """A column for each model, a row for each number."""
    models, batch = found["models"], found["memory"]["batch"]
    rows = [["", *(model["name"] for model in models)]]

    def row(name: str, cells: Iterable[str]) -> None:
        rows.append([name, *cells])

    row("competes at", (model["role"] for model in models))
    row("parameters", (number(model["parameters"]["total"]) for model in models))
    row("used per token", (number(model["parameters"]["active"]) for model in models))
    row("weights", (f"{size(m['weights_bytes'])} {m['precision']}" for m in models))
    row("read per token", (size(model["weights_bytes_touched"]) for model in models))
    row("KV cache per token", (size(model["kv_cache_bytes_per_token"]) for model in models))
    row("GFLOPs per token", (f"{model['flops_per_token'] / 1e9:.1f}" for model in models))
    row("fits here", ("yes" if model["fits"] else "no" for model in models))
    row(
        f"decode tok/s, batch {batch}",
        (_held(speed(model["decode_tokens_per_second"]), model) for model in models),
    )
    row(
        f"prefill tok/s, {models[0]['prefill_tokens']:,} tokens",
        (_held(speed(model["prefill_tokens_per_second"]), model) for model in models),
    )
    row("USD/M tokens", (money(model["usd_per_million"]) for model in models))
    row("kWh/M tokens", (money(model["kwh_per_million"]) for model in models))
    for method, name in (("full", "GPUs to train"), ("lora", "with LoRA"), ("qlora", "with QLoRA")):
        row(name, (_trainers(model["train_gpus"][method]) for model in models))
    where = f"{found['machine']['gpus']} x {device_name(found['machine'])}"
    return f"{table(rows)}\nspeeds are the roofline of {where}: at best, never reached{_BRACKETS}"


def _held(cell: str, said: Answer) -> str:
    """A speed in brackets where the memory is not there."""
    return cell if said["fits"] else f"({cell})"


def _trainers(said: Answer) -> str:
    """How many GPUs train it, and how many of these share out its experts."""
    if said["gpus"] is None:
        return f"none: {said['largest']['part']} {size(said['largest']['bytes'])}"
    return f"{said['gpus']:,}" + (f" (ep {said['ep']})" if said["ep"] > 1 else "")


def _cache(found: Answer) -> str:
    """How much smaller the KV cache is than the other model's, by make and by bits."""
    said, ours = found["kv_cache_against"], found["kv_cache_elements_per_token"]
    if not said or not said["elements_saved"]:
        return ""
    line = (
        f"KV cache: {ours:,} elements per token, {said['name']} has"
        f" {said['elements_per_token']:,}: {said['elements_saved']:+.1%} by make"
    )
    bits = found["memory"]["kv_bits"]
    return line if bits == 16 else f"{line}, {said['bytes_saved']:+.1%} with {bits:g} bits for 16"


def _decode(found: Answer) -> str:
    against = found["decode"]
    if not against:
        return ""
    head = ["batch", "experts read", "MoE tok/s", "ms", "± ms", "USD/M tokens"]
    rows = [[*head, "dense tok/s", "USD/M tokens", "speed", "bytes", "FLOPs"]]
    shown = (*_BATCHES, found["memory"]["batch"])
    rows += [_race(each) for each in against["rows"] if each["batch"] in shown]
    faded = against["fades_at"]
    fades = (
        f"half of the lead is gone at batch {faded}" if faded else "the lead holds at every batch"
    )
    tax = f"routing takes {against['routing_tax']:.1%} of a decode step"
    return f"decoding beside {against['against']}\n{table(rows)}\n{fades}; {tax}"


def _race(each: Answer) -> list[str]:
    moe, dense = each["moe"], each["dense"]
    return [
        str(each["batch"]),
        f"{each['experts_touched']:.1f}",
        _held(speed(moe["tokens_per_second"]), moe),
        f"{1e3 * moe['seconds']:.2f}",
        f"{1e3 * moe['sigma_seconds']:.2f}",
        money(moe["usd_per_million"]),
        _held(speed(dense["tokens_per_second"]), dense),
        money(dense["usd_per_million"]),
        *(f"{each[key]:.2f}x" for key in ("speed_ratio", "bytes_ratio", "flops_ratio")),
    ]


def _offload(found: Answer) -> str:
    said = found["offload"]
    if not said:
        return ""
    return (
        f"experts over {said['link']}, {said['hit_rate']:.0%} of requests found in the cache:"
        f" {size(said['bytes_per_token'])} per token, {said['slow']:.3g} tok/s,"
        f" {said['fast']:.3g} if every load hides behind compute"
    )


def _traffic(found: Answer) -> str:
    links = found["all_to_all"]
    if not links or not found["training"]["asked"]:
        return ""
    head = [f"experts over {links[0]['ranks']} ranks", "kB per token, layer"]
    rows = [[*head, "ms of a training step", "its share", "ms of a decode step"]]
    rows += [
        [
            each["link"],
            f"{each['bytes_per_token_layer'] / 1e3:.1f}",
            f"{each['training_seconds'] * 1e3:,.1f}",
            f"{each['training_share']:.0%}",
            f"{each['decode_seconds'] * 1e3:,.2f}",
        ]
        for each in links
    ]
    return f"{table(rows)}\nif nothing of it hides behind compute"


def _training(found: Answer) -> str:
    said = found["training"]
    if not said["asked"]:
        return ""
    layout = said["layout"]
    gpus = layout["fsdp"] * layout["tp"]
    head = f"{said['method']} training, {said['batch']} x {found['memory']['context']:,} tokens on"
    head = f"{head} each of {gpus:,} GPU" + "s" * (gpus > 1)
    rows = [[head, "per GPU"]]
    rows += [[name, size(value)] for name, value in said["per_gpu"].items() if value]
    fits = "fits" if said["fits"] else "does not fit"
    spread = ", ".join(f"{name} {ways}" for name, ways in layout.items())
    memory = size(found["machine"]["memory_bytes"])
    parts = [
        f"{name.replace('_', ' ')} {1e3 * value:,.1f}"
        for name, value in said["by_part"].items()
        if value
    ]
    step = (
        f"at {said['utilisation']:.1%} of the peak {speed(said['tokens_per_second'])} tok/s:"
        f" a step takes {1e3 * said['step_seconds']:,.1f} ms ({', '.join(parts)})"
    )
    return f"{table(rows)}\n{spread}: {fits} into {memory}\n{step}"


def _cost(found: Answer) -> str:
    said, device = found["cost"], found["machine"]["device"]
    parts = [
        f"{said['flops']:.3g} FLOPs",
        f"{number(said['gpu_hours'])} {device}-hours at {said['utilisation']:.1%} of the peak",
    ]
    if said["usd"] is not None:
        parts.append(f"{number(said['usd'])} USD")
    if said["kwh"] is not None:
        parts.append(f"{number(said['kwh'])} kWh")
    return f"to train it on {number(said['tokens'])} tokens: {', '.join(parts)}"


def _scaling(found: Answer) -> str:
    said = found["scaling_law"]
    if not said:
        return ""
    rows = [
        ["scaling law, same FLOPs", "loss", "tokens"],
        ["this MoE", f"{said['moe']:.3f}", number(said["tokens"])],
        [
            "dense, its active parameters",
            f"{said['dense_equal_compute']:.3f}",
            number(said["tokens"]),
        ],
        [
            "dense, all its parameters",
            f"{said['dense_equal_memory']:.3f}",
            number(said["dense_tokens"]),
        ],
    ]
    lines = [table(rows), f"a dense model needs {said['saving']:.2f}x the FLOPs for the same loss"]
    if said["beyond"]:
        lines.append(f"! it extrapolates, take it as a hint: {'; '.join(said['beyond'])}")
    return "\n".join(lines)


def _verdict(found: Answer) -> str:
    said = found["verdict"]
    lines = [f"verdict: {said['summary']}"]
    lines += [f"- {reason}" for reason in said["reasons"]]
    if said["options"]:
        rows = [["ways to run it", "memory", "GPUs", "tok/s", "points lost"]]
        rows += [_option(each) for each in said["options"][:_OPTIONS]]
        lines += ["", table(rows)]
    return "\n".join(lines)


def _option(each: Answer) -> list[str]:
    return [
        f"{each['what']}  {each['flags']}",
        size(each["resident"]),
        str(each["gpus"]),
        speed(each["tokens_per_second"]),
        f"{each['quality']:.1f} {each['known']}",
    ]


def device_name(machine: Answer) -> str:
    """A device and its memory, as people say it."""
    return f"{machine['device']} of {size(machine['memory_bytes'])}"


def size(count: float) -> str:
    """Bytes for people: 93.4 GB, 131 kB."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * least:  # what rounds up to it, too
            return f"{count / least:.3g} {unit}"
    return f"{count:.0f} B"


def speed(rate: float) -> str:
    """Tokens per second, three digits."""
    return f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"


def money(amount: float | None) -> str:
    """USD or kWh; a dash where the machine has no price, or no watts."""
    return "-" if amount is None else speed(amount)
