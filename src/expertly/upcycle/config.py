"""What the job of upcycling is told."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """A dense model, or a recipe of several, and the MoE to make of it."""

    model: str  # a folder, or a YAML file as mergekit-moe reads
    output_dir: str
    num_experts: int | None = None  # all together; None: 8 copies, or the recipe's specialists
    slices: int = 1  # that a copy of the feed-forward is cut into; a token needs all of a copy
    top_k: int | None = None  # None: two copies, the recipe's, or all if there are fewer
    every: int = 1  # which layers get experts: each n-th, counted from the end
    shared: bool = False  # keep the dense feed-forward as an always-on expert, of half the weight
    drop: float = 0.0  # Drop-Upcycling: the share of each expert's units that begins anew
    drop_apart: bool = False  # gate, up and down lose units of their own, as its released code does
    noise: float = 0.0  # on each expert's matrix, as a share of its standard deviation
    router: Literal["random", "zero", "clusters"] = "random"
    target: str = ""  # transformers' model_type of the MoE; "": the first that can say it exactly
    data: tuple[str, ...] = ("stdlib",)  # text for the proof and for clusters
    tokens: int = 4096  # of held-out text that the proof reads; clusters read twice as many others
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        apart, tied = self.drop_apart and not self.drop, self.router == "zero" and self.slices > 1
        counts = {"num_experts": self.num_experts, "top_k": self.top_k}
        wrong = {
            **{
                leaf: n is not None and n < 1 and "must be at least 1" for leaf, n in counts.items()
            },
            "slices": self.slices < 1 and "must be at least 1",
            "every": self.every < 1 and "must be at least 1",
            "drop": not 0 <= self.drop <= 1 and "must be from 0 to 1",
            "drop_apart": apart and "says how units are dropped, and drop is 0",
            "noise": not 0 <= self.noise <= 1 and "must be from 0 to 1",
            "router": tied and "zero ties all experts: a token would get slices of several copies",
            "data": not self.data and "must name some text",
            "tokens": self.tokens < 64 and "must be at least 64",
            "seed": not 0 <= self.seed < 2**63 and "must be from 0 to below 2^63",
        }
        yield from ((leaf, why) for leaf, why in wrong.items() if why)
