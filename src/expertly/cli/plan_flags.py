"""The flags of `expertly plan`: a line of help each, in the panels that --help shows."""

from pathlib import Path
from typing import Annotated, Any

import typer


def _flag(panel: str, help: str, name: str | None = None) -> Any:
    words = () if name is None else (name,)
    return typer.Option(*words, help=help, rich_help_panel=panel, show_default=False)


_MODEL, _MACHINE, _AGAINST, _TRAIN = "Model", "Machine", "Comparison", "Training and cost"


Model = Annotated[
    str | None,
    typer.Argument(help="A model folder, a config.json or a built-in name.", show_default=False),
]
Dtype = Annotated[
    str | None, _flag(_MODEL, "Format of all weights: fp32, bf16, fp8, int8, mxfp4 ...")
]
Bits = Annotated[
    str | None,
    _flag(_MODEL, "Bits of experts, dense layers and attention: 4, 4g32, 3,attention=4."),
]
KvBits = Annotated[float, _flag(_MODEL, "Bits of the KV cache. Default: 16.")]
Context = Annotated[
    int | None, _flag(_MODEL, "Tokens of a sequence. Default: 4096, or what the model allows.")
]
Batch = Annotated[int, _flag(_MODEL, "Sequences that are served at a time. Default: 1.")]
Gpu = Annotated[str | None, _flag(_MACHINE, "h100, h200, a100-80gb, 4090, mi300x, m4-max, cpu ...")]
Gpus = Annotated[
    int | None, _flag(_MACHINE, "How many. Default: 1 if named, else as many as it takes.")
]
Memory = Annotated[str | None, _flag(_MACHINE, "Of each GPU: 24GB.")]
Link = Annotated[
    str | None, _flag(_MACHINE, "Between GPUs: nvlink4, infiniband-400, ethernet-100 ...")
]
Offload = Annotated[
    str | None, _flag(_MACHINE, "Keep experts behind a link: pcie4 (RAM), nvme (disk) ...")
]
HitRate = Annotated[
    float | None, _flag(_MACHINE, "Share of expert requests that the cache serves.")
]
Ram = Annotated[
    str | None, _flag(_MACHINE, "For experts beside the GPUs. Default: 4 times their memory.")
]
Hardware = Annotated[
    Path | None, _flag(_MACHINE, "Your own machines: a YAML file, laid over the table.")
]
Vs = Annotated[str | None, _flag(_AGAINST, "A dense model to compare with.")]
Fit = Annotated[
    str | None, _flag(_AGAINST, "List the built-in models that fit into so much memory: 24GB.")
]
Method = Annotated[str, _flag(_TRAIN, "full, lora or qlora. Default: full.")]
Rank = Annotated[int, _flag(_TRAIN, "Of LoRA's adapters. Default: 16.")]
Fsdp = Annotated[int | None, _flag(_TRAIN, "GPUs that shard the training state.")]
Ep = Annotated[int, _flag(_TRAIN, "Ranks that share out the experts. Default: 1.")]
Tp = Annotated[int, _flag(_TRAIN, "Ranks that share every matrix. Default: 1.")]
Imbalance = Annotated[
    float | None,
    _flag(_TRAIN, "Tokens of the fullest expert rank over the mean. Default: 1; training: 1.5."),
]
TrainBatch = Annotated[
    int | None, _flag(_TRAIN, "Sequences that each GPU trains on at a time. Default: 1.")
]
KeepActivations = Annotated[
    bool, _flag(_TRAIN, "Without gradient checkpointing.", "--keep-activations")
]
TrainTokens = Annotated[
    str | None,
    _flag(_TRAIN, "To train from scratch on: 15T. Default: 20 per active parameter."),
]
TuningTokens = Annotated[str | None, _flag(_TRAIN, "In a fine-tuning set: 50M.")]
Utilisation = Annotated[
    float | None, _flag(_TRAIN, "Share of the peak that training reaches. Default: 0.4.")
]
GpuHours = Annotated[str | None, _flag(_TRAIN, "GPU-hours that training took, instead: 2.788M.")]
Price = Annotated[float | None, _flag(_TRAIN, "USD per GPU and hour.")]
Plot = Annotated[
    Path | None, typer.Option(help="Draw speed and memory: a .png, .svg or .pdf file.")
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Also run it here, and compare with the prediction.")
]
