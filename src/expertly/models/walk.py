"""Walk a decoder layer by layer with one layer's weights in memory, in float32.

The model's own forward says what each layer is called with: masks, positions, windows. So this
holds for every decoder whose layers take the hidden states first. Rows go through a layer one by
one, so that what is in between is that of one row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from expertly.memory import give_back
from expertly.models.build import ModelShape, build_model
from expertly.models.checks import quiet

_VOCABULARY = 4096  # words of the head at once


class Weights(Protocol):
    """A model's parameters by their names in it, in any float."""

    def tensor(self, name: str) -> Tensor:
        """All of one."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a matrix."""

    def gather(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at some indices."""


class Passed(NamedTuple):
    """What went through one layer."""

    layer: int
    states: Tensor  # (tokens, dim), row by row what its feed-forward, or router, was given
    hidden: list[Tensor]  # by row (seq, dim), after it; after the last normed, as the head sees it


@torch.no_grad()
def walk(shape: ModelShape, weights: Weights, rows: Sequence[Tensor]) -> Iterator[Passed]:
    """Pass rows of tokens, (seq,) each and of any lengths, through a model with these weights.

    Each layer's parameters are read when its turn comes, and let go.
    """
    with quiet(), torch.device("meta"):
        model = build_model(shape).eval()
    decoder: Any = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config)
    layers, calls = decoder.layers, [_Call() for _ in decoder.layers]
    decoder.layers = nn.ModuleList(calls)
    _fill(decoder.norm, weights, "model.norm")
    hidden = [_embed(decoder.embed_tokens, weights, ids) for ids in rows]
    for row in {len(row): row for row in hidden}.values():
        decoder(inputs_embeds=row[None], use_cache=False)
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        _fill(layer, weights, f"model.layers.{index}")
        states = _pass(layer, call, hidden)
        layer.to("meta")
        give_back()
        last = index + 1 == len(calls)
        yield Passed(index, states, [decoder.norm(row) for row in hidden] if last else [*hidden])
        del states


class _Call(nn.Module):
    """Stands in for a layer, and keeps what it is called with for a row of each length."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[int, dict[str, Any]] = {}

    def forward(self, hidden: Tensor, **said: Any) -> Tensor:
        self.said[hidden.shape[1]] = said
        return hidden


def _pass(layer: nn.Module, call: _Call, hidden: list[Tensor]) -> Tensor:
    """Put what a layer makes of each row in its place; what its feed-forward saw, (tokens, dim)."""
    states = torch.empty(sum(map(len, hidden)), hidden[0].shape[-1])
    seen: list[Tensor] = []
    handle = layer.get_submodule("mlp").register_forward_pre_hook(_keeper(seen))
    start = 0
    for i, row in enumerate(hidden):
        hidden[i] = layer(row[None], **call.said[len(row)])[0]
        states[start : start + len(row)] = seen.pop().flatten(0, -2)
        start += len(row)
    handle.remove()
    return states


def _keeper(states: list[Tensor]) -> Callable[[nn.Module, tuple], None]:
    def keep(module: nn.Module, args: tuple) -> None:
        states.append(args[0])

    return keep


def _fill(module: nn.Module, weights: Weights, prefix: str) -> None:
    """Give a module on the meta device its parameters, in float32."""
    values = {name: weights.tensor(f"{prefix}.{name}").float() for name in module.state_dict()}
    module.load_state_dict(values, assign=True)


def _embed(module: Any, weights: Weights, ids: Tensor) -> Tensor:
    """The embeddings of ids (seq,): (seq, dim); Gemma multiplies them."""
    found = weights.gather("model.embed_tokens.weight", ids).float()
    return found * getattr(module, "scalar_embed_scale", 1.0)


class Head(NamedTuple):
    """What makes logits of a model's last hidden states."""

    weights: Weights
    name: str


class Difference(NamedTuple):
    """Two models on the same text, in float32."""

    largest: float  # between their logits
    scale: float  # the largest logit of the first
    losses: list[float]  # of each: the next token's, in nats per token


@torch.no_grad()
def compare(
    hidden: Sequence[Sequence[Tensor]], heads: list[Head], vocabulary: int, ids: Tensor
) -> Difference:
    """Compare two models by their last hidden states, by row (seq, dim), some words at a time.

    ids: (rows, seq), the text that both have read.
    """
    flat = [torch.cat([*rows]) for rows in hidden]
    places = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()  # that have a next token
    words = ids[:, 1:].flatten()
    totals = torch.full((2, ids.numel()), -torch.inf)
    meant = torch.zeros(2, len(words))
    largest = scale = torch.zeros(())
    for start in range(0, vocabulary, _VOCABULARY):
        stop = min(start + _VOCABULARY, vocabulary)
        one, other = (
            x @ head.weights.rows(head.name, start, stop).float().T
            for x, head in zip(flat, heads, strict=True)
        )
        scale = torch.maximum(scale, one.abs().max())
        here = (start <= words) & (words < stop)
        for i, logits in enumerate((one, other)):
            totals[i] = torch.logaddexp(totals[i], logits.logsumexp(dim=1))
            meant[i, here] = logits[places[here], words[here] - start]
        largest = torch.maximum(largest, one.sub_(other).abs_().max())  # a NaN stays
    losses = (totals[:, places] - meant).mean(dim=1).tolist()
    return Difference(float(largest), float(scale), losses)
