"""What a training run is told, section by section. Leaves use Hugging Face's spellings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from expertly.data.config import DataConfig
from expertly.errors import nearest
from expertly.moe.capacity import Fill, Overflow


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model folder to go on from, or a family with sizes to start from scratch."""

    path: str = ""
    family: str = ""  # transformers' model_type: qwen3_moe, mixtral, olmoe, deepseek_v3, llama, ...
    twin: bool = False  # build the family's dense twin instead, all else equal
    hidden_size: int | None = None  # this and the sizes below: None keeps the family's default
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None  # of dense layers
    moe_intermediate_size: int | None = None  # of one expert
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    num_shared_experts: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # any other key of the family's config
    expert_dropout: float = 0.0  # on an expert's inner activation
    bits: int | None = None  # pack the weights of model.path while they load: 4 or 8; with lora
    dtype: Literal["float32", "auto"] = "float32"  # auto: as the files have it; with lora

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if bool(self.path) == bool(self.family):
            yield "family", "give either model.path or model.family with sizes"
        if self.twin and self.path:
            yield "twin", "a twin is built from a family's sizes, not from model.path"
        if self.path:
            yield from ((size, "model.path fixes the sizes") for size in self.sizes())
        if self.path and self.extra:
            yield "extra", "model.path fixes the family's config"
        if self.bits not in (None, 4, 8):
            yield "bits", "must be 4 or 8"
        if not 0 <= self.expert_dropout < 1:
            yield "expert_dropout", "must be from 0 to below 1"

    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        others = ("path", "family", "twin", "extra", "expert_dropout", "bits", "dtype")
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: v for k, v in named.items() if v is not None and k not in others}


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The routing policy and what keeps it balanced; dense models ignore it."""

    router: str = ""  # a name in expertly.moe.routing.ROUTERS; "" is the family's own
    top_k: int | None = None  # None: the model's
    options: dict[str, Any] = field(default_factory=dict)
    jitter: float = 0.0
    capacity_factor: float | None = None  # None: dropless
    eval_capacity_factor: float | None = None
    overflow: Overflow = "drop"
    fill: Fill = "choice"
    router_aux_loss_coef: float = 0.01
    sequence_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.001
    scope: Literal["global", "micro"] = "global"
    exact: bool = True  # with accumulation: fix the load fractions in a count pass first
    bias_update_rate: float = 0.0  # aux-loss-free balancing, for routers with a bias
    allow_non_stock: bool = False  # save a policy that stock loaders do not know
    straight_through: bool = False  # routers learn from all experts, unused ones too (DenseMixer)
    on_collapse: Literal["warn", "rebalance", "stop"] = "warn"  # what an alarm of collapse leads to

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        for leaf in ("router_aux_loss_coef", "sequence_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, leaf) < 0:
                yield leaf, "must not be negative"
        if self.bias_update_rate < 0:
            yield "bias_update_rate", "must not be negative"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside weights that stand still (Hu et al. 2021, arXiv 2106.09685)."""

    r: int = 0  # rank; 0: no adapters, the weights themselves learn
    lora_alpha: float = 16.0  # the adapter's answer is scaled by lora_alpha / r
    targets: tuple[Literal["experts", "attention", "shared_experts", "router"], ...] = (
        "experts",
        "attention",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if self.r < 0:
            yield "r", "must not be negative; 0 means no adapters"
        if self.lora_alpha <= 0:
            yield "lora_alpha", "must be above 0"
        if not self.targets or len({*self.targets}) < len(self.targets):
            yield "targets", "must name at least one part, and each once"


FREEZABLE = ("experts", "attention", "all_but_router")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; no decay on norms and biases."""

    learning_rate: float = 1e-3
    router_learning_rate: float | None = None  # None: as learning_rate
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    freeze: dict[str, int] = field(default_factory=dict)  # part: steps it stands still; -1: all
    on_bad_step: Literal["skip", "roll_back", "stop"] = "skip"  # a loss not finite, or a jump
    spike_sigmas: float = 6.0  # a loss so far above the last ones' mean is a jump; 0: never
    max_bad_steps: int = 10  # one after another; then the run stops

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if self.learning_rate <= 0:
            yield "learning_rate", "must be above 0"
        if self.router_learning_rate is not None and self.router_learning_rate < 0:
            yield "router_learning_rate", "must not be negative; 0 freezes the router"
        yield from self._unfreezable()
        for leaf in ("weight_decay", "max_grad_norm", "spike_sigmas", "max_bad_steps"):
            if getattr(self, leaf) < 0:
                yield leaf, "must not be negative"
        for leaf in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, leaf) < 1:
                yield leaf, "must be from 0 to below 1"
        if self.adam_epsilon <= 0:
            yield "adam_epsilon", "must be above 0"

    def _unfreezable(self) -> Iterator[tuple[str, str]]:
        """What freeze asks for that cannot be."""
        for part, steps in self.freeze.items():
            if part not in FREEZABLE:
                yield f"freeze.{part}", f"no such part; {nearest(part, FREEZABLE)}"
            if steps < -1:
                yield f"freeze.{part}", "must be a number of steps, or -1 for all of them"
        if self.freeze.get("all_but_router") and self.router_learning_rate == 0:
            yield "freeze", "nothing would learn: the routers' rate is 0, and the rest stands still"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, in which portions, and the learning rate's course."""

    max_steps: int = 1000
    num_train_epochs: float = 0.0  # passes over the training rows; 0: max_steps says how long
    per_device_train_batch_size: int = 8  # rows of data.sequence_length tokens
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_ratio: float = 0.05
    decay_ratio: float = 0.2  # wsd: the share of steps at the end that decay
    min_lr_ratio: float = 0.1
    bf16: bool = False  # autocast
    gradient_checkpointing: bool = False

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all its micro-batches."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        for leaf in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, leaf) < 1:
                yield leaf, "must be at least 1"
        if self.num_train_epochs < 0:
            yield "num_train_epochs", "must not be negative; 0 leaves it to max_steps"
        for leaf in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, leaf) <= 1:
                yield leaf, "must be from 0 to 1"
        if self.lr_scheduler_type == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            yield "decay_ratio", "warm-up and decay together are longer than the run"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss per domain, on the same rows each time."""

    eval_steps: int = 100

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if self.eval_steps < 1:
            yield "eval_steps", "must be at least 1"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down, and how often in optimizer steps."""

    logging_steps: int = 10
    save_steps: int = 500
    report_to: tuple[Literal["tensorboard"], ...] = ()  # metrics.jsonl is always written

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        for leaf in ("logging_steps", "save_steps"):
            if getattr(self, leaf) < 1:
                yield leaf, "must be at least 1"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    output_dir: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    router: RouterConfig = RouterConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that cannot be, as (leaf, why)."""
        if not self.output_dir:
            yield "output_dir", "must name a folder"
        if self.router.on_collapse == "rebalance" and self.optim.router_learning_rate == 0:
            yield "router.on_collapse", "routers drawn anew could not learn, their rate is 0"
        if self.router.straight_through and self.optim.router_learning_rate == 0:
            yield "router.straight_through", "it is for routers that learn, and their rate is 0"
        if self.data.conversations and not self.model.path:
            yield "data.conversations", "they are for a model that is there: give model.path"
        if not 0 <= self.seed < 2**63:
            yield "seed", "must be from 0 to below 2^63"
        yield from self._with_lora() if self.lora.r else self._without_lora()

    def _with_lora(self) -> Iterator[tuple[str, str]]:
        """What adapters rule out."""
        if not self.model.path:
            yield "lora.r", "adapters are for a model that is there: give model.path"
        if self.optim.freeze:
            yield "optim.freeze", "with adapters, lora.targets says what learns"
        if self.optim.router_learning_rate is None:
            yield "optim.router_learning_rate", "say it beside lora.r; 0 leaves routers as they are"
        if self.optim.router_learning_rate and "router" in self.lora.targets:
            why = "routers learn by an adapter (lora.targets) or by themselves, not both: set it 0"
            yield "optim.router_learning_rate", why
        if self.router.straight_through:
            yield "router.straight_through", "it is for routers that learn beside all weights"
        if self.router.router or self.router.top_k is not None or self.router.bias_update_rate:
            yield "router", "an adapter cannot hold another routing rule, top_k or selection bias"
        if self.router.on_collapse == "rebalance":
            yield "router.on_collapse", "routers drawn anew would not fit experts that stand still"

    def _without_lora(self) -> Iterator[tuple[str, str]]:
        """What needs adapters."""
        if self.model.bits is not None:
            yield "model.bits", "packed weights do not learn: set lora.r as well"
        if self.model.dtype != "float32":
            yield "model.dtype", "weights that learn are float32; schedule.bf16 computes in less"
