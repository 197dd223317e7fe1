"""From a config.json to a Shape: the formulas of every family in makes.py.

What transformers' classes make of a config is what is counted here: tests build each on the meta
device and compare part by part.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from expertly.families import Sizes, decoder, family_of, moe_layer_indices, sizes
from expertly.models.configs import check_values
from expertly.plan.gemma3 import with_tower
from expertly.plan.makes import MAKES, Make
from expertly.plan.numbers import whole, wrong
from expertly.plan.shape import Attention, FeedForward, Layer, Shape
from expertly.plan.stored import stored_as
from expertly.plan.switch import switch_shape

Config = Mapping[str, Any]
# Does a layer look back at a window only? By the layer's index and its config.
WINDOWS: dict[str, Callable[[int, Config], bool]] = {
    "none": lambda layer, config: False,
    "all": lambda layer, config: config.get("use_sliding_window") is not False,
    "even": lambda layer, config: layer % 2 == 0,
    "all but every sixth": lambda layer, config: (
        (layer + 1) % whole(config, "sliding_window_pattern", default=6) != 0
    ),
    "beyond": lambda layer, config: (
        bool(config.get("use_sliding_window")) and layer >= _windows_from(config)
    ),
    "even before": lambda layer, config: (
        bool(config.get("use_sliding_window")) and layer % 2 == 0 and layer < _windows_from(config)
    ),
}


def has_formulas(config: Config) -> bool:
    """Whether a config's family is counted here; the others are built on the meta device."""
    return config["model_type"] in {*MAKES, *_OWN}


def read_shape(config: Config, name: str) -> Shape:
    """A config's Shape; `name` is what the user calls it. Raises E305 for sizes that are missing,
    or no sizes, and what families.sizes raises.
    """
    if config["model_type"] in _OWN:
        return _OWN[config["model_type"]](config, name)
    make = MAKES[config["model_type"]]
    config = with_defaults(config, make)
    dim, vocab = whole(config, "hidden_size"), whole(config, "vocab_size")
    made = (
        Layer(
            attention=attention(config, make, index),
            feed_forward=network,
            norms=make.norms * dim * (1 + make.norm_bias),
        )
        for index, network in enumerate(_networks(config, make))
    )
    kinds: dict[Layer, Layer] = {}  # equal layers become one object, which compares at once
    layers = tuple(kinds.setdefault(layer, layer) for layer in made)
    tied = bool(config.get("tie_word_embeddings"))
    bias = vocab * on(config, make.head_bias)
    stored = stored_as(config)
    return Shape(
        name=name,
        family=config["model_type"],
        dim=dim,
        vocab=vocab,
        layers=layers,
        embeddings=vocab * dim,
        head=bias + (0 if tied else vocab * dim),
        norms=dim * (1 + make.norm_bias),
        context=config.get("max_position_embeddings"),
        stored=stored.formats,
        notes=(*_left_out(config), *stored.notes),
    )


def _gemma3(config: Config, name: str) -> Shape:
    """Of a composite: its decoder's, with the tower."""
    said = {"torch_dtype": config.get("torch_dtype"), **decoder(config)}
    return with_tower(config, read_shape({**said, "model_type": "gemma3_text"}, name))


# the families that no row of MAKES can say
_OWN: dict[str, Callable[[Config, str], Shape]] = {
    "switch_transformers": switch_shape,
    "gemma3": _gemma3,
}


def _left_out(config: Config) -> Iterator[str]:
    """What a checkpoint may hold that its class does not load."""
    ahead = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    if isinstance(ahead, int) and ahead > 0:
        yield f"without its {ahead} layers that predict further tokens (MTP), which no class loads"


def with_defaults(config: Config, make: Make) -> Config:
    """A config with what its class says for the keys that it leaves out."""
    heads = {"num_key_value_heads": config.get("num_attention_heads")}
    said = {key: value for key, value in config.items() if not _unsaid(key, value)}
    return {**heads, **make.defaults, **said}


def _unsaid(key: str, value: Any) -> bool:
    # null means the class default for these alone; a null rank or window means none
    return value is None and key in ("num_key_value_heads", "head_dim", "tie_word_embeddings")


def attention(config: Config, make: Make, layer: int) -> Attention:
    """What the attention of one layer holds and keeps: of grouped heads, or of a latent."""
    if config.get("kv_lora_rank"):
        return _latent(config, make)
    dim, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    keys, head = whole(config, "num_key_value_heads"), head_dim(config)
    width, kept = heads * head, 2 * keys * head
    biases = (width + kept) * on(config, make.qkv_bias) + dim * on(config, make.out_bias)
    norms = {None: 0, "head": 2 * head, "all": width + keys * head}[_qk_norm(config, make)]
    return Attention(
        weights=dim * (2 * width + kept) + biases + heads * make.sinks,
        norms=norms,
        width=width,
        cache=kept,
        shards=keys,
        pair=2 * width,
        window=window(config, make, layer),
    )


def _latent(config: Config, make: Make) -> Attention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): the cache holds the latent."""
    dim, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    latent, turned = whole(config, "kv_lora_rank"), whole(config, "qk_rope_head_dim", least=0)
    plain, values = whole(config, "qk_nope_head_dim", least=0), whole(config, "v_head_dim")
    asked, rank = heads * (plain + turned), config.get("q_lora_rank")
    if rank is None:
        queries, query_bias, rank = dim * asked, 0, 0
    else:
        rank = query_bias = whole(config, "q_lora_rank")
        queries = rank * (dim + asked)
    cache = latent + turned
    weights = queries + dim * cache + latent * heads * (plain + values) + heads * values * dim
    biases = (query_bias + cache) * on(config, make.qkv_bias) + dim * on(config, make.out_bias)
    return Attention(
        weights=weights + biases,
        norms=rank + latent,
        width=heads * values,
        cache=cache,
        pair=heads * (plain + turned + values),
        absorbed=heads * (cache + latent),
    )


def window(config: Config, make: Make, layer: int) -> int | None:
    """How many tokens a layer looks back at; None for all."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) > layer:
        slides = kinds[layer] == "sliding_attention"
    else:
        slides = WINDOWS[make.window](layer, config)
    said = slides and config.get("sliding_window")
    return whole(config, "sliding_window") if said else None


def _windows_from(config: Config) -> int:
    return whole(config, "max_window_layers", default=28, least=0)


def _networks(config: Config, make: Make) -> list[FeedForward]:
    """The feed-forward network of each layer."""
    number = whole(config, "num_hidden_layers", most=10_000)
    config = {**config, "model_type": make.experts_as or config["model_type"]}
    if make.experts_as:  # a row that reading the file did not know of
        check_values(config, "config.json")
    has_experts = family_of(config) is not None
    moe = set(moe_layer_indices(config)) if has_experts else set()
    inner = experts(config, make, sizes(config)) if has_experts else FeedForward()
    if moe.issuperset(range(number)):
        return [inner] * number
    width = whole(config, "intermediate_size")
    dense = FeedForward(dense=_gated(config, make, width), width=width)
    return [inner if layer in moe else dense for layer in range(number)]


def experts(config: Config, make: Make, moe: Sizes) -> FeedForward:
    """The network of an MoE layer."""
    check_experts(moe)
    dim = whole(config, "hidden_size")
    biases = (2 * moe.expert_width + dim) if make.expert_bias else 0
    gate = dim if make.shared_gate and moe.shared_width else 0
    return FeedForward(
        router=moe.num_experts * (dim + make.router_bias),
        expert=3 * dim * moe.expert_width + biases,
        expert_width=moe.expert_width,
        experts=moe.num_experts,
        top_k=moe.top_k,
        shared=_gated(config, make, moe.shared_width) + gate if moe.shared_width else 0,
        width=moe.shared_width,
    )


def check_experts(moe: Sizes) -> None:
    """Raises E305 for sizes of experts that no model has."""
    for name, value in moe._asdict().items():
        whole({name: value}, name, least=0 if name == "shared_width" else 1)
    if moe.top_k > moe.num_experts:
        raise wrong(f"a token uses {moe.top_k} experts, but there are {moe.num_experts}")


def _gated(config: Config, make: Make, width: int) -> int:
    """A gated network's parameters: gate, up and down."""
    dim = whole(config, "hidden_size")
    return 3 * dim * width + (2 * width + dim) * on(config, make.mlp_bias)


def _qk_norm(config: Config, make: Make) -> str | None:
    return None if make.qk_norm_if and not config.get(make.qk_norm_if) else make.qk_norm


def head_dim(config: Config) -> int:
    """The width of a head, said or derived; E305 where the heads do not fill the model."""
    if config.get("head_dim") is not None:
        return whole(config, "head_dim")
    dim, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    if dim < heads:
        raise wrong(f"num_attention_heads is {heads}, more than hidden_size is: {dim}")
    return dim // heads


def on(config: Config, said: bool | str) -> bool:
    """Whether something is there: as the code says, or as the config's key does."""
    return bool(config.get(said)) if isinstance(said, str) else said
