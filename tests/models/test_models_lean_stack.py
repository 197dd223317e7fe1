"""Packed models of lean layers, one native call a token: they answer as their parts do, to the bit,
and step back for whoever asks for more."""

import io
import pickle
import tempfile
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from packed_models import model_of, saved
from transformers import DynamicCache

import expertly
from expertly.kernels.native import library
from expertly.kernels.native_layers import NativeLayers
from expertly.models.lean import undo_lean
from expertly.models.lean_forward import lean_of
from expertly.models.lean_layer import LeanLayer
from expertly.models.lean_stack import LeanStack

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

# native attention takes 32 numbers at a time
SIZES = {"hidden_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "olmoe": {},
    "qwen3_moe": {"head_dim": 32},
    "mixtral": {"head_dim": 32, "sliding_window": None},
}
family_of_each = pytest.mark.parametrize("family", FAMILIES)
PROMPT = 5


@cache
def opened(family, bits=4, dtype=torch.bfloat16, **changes):
    """A lean packed model; leave it as it is."""
    model = model_of(family, **{**SIZES, **FAMILIES.get(family, {}), **changes}).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
        if name.endswith("gate.weight"):  # of large logits the weights tip
            parameter.data *= 0.1
    with tempfile.TemporaryDirectory() as folder:
        return expertly.open_model(saved(model, Path(folder) / "model"), bits=bits)


def lean_model(*args, **changes):
    return deepcopy(opened(*args, **changes))


def leans(model, kind):
    return [module for module in model.modules() if isinstance(lean_of(module), kind)]


def without(model, *kinds):
    """The same model, but for the lean forwards of some kinds."""
    copied = deepcopy(model)
    for module in leans(copied, kinds):
        del module.forward
    return copied


def variants(model):
    """The model as a stack, as layers, and as parts."""
    return model, without(model, LeanStack), without(model, LeanStack, LeanLayer)


def bare(model):
    copied = deepcopy(model)
    undo_lean(copied)
    return copied


@torch.inference_mode()
def stepped(model, ids, prompt=PROMPT, **given):
    """Logits of a prompt, and of the tokens behind it one by one."""
    out = model(ids[:, :prompt], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for token in ids[:, prompt:].split(1, dim=1):
        logits.append(model(token, past_key_values=cache, use_cache=True, **given).logits)
    return torch.cat(logits, dim=1)


def close(got, want):
    """Whether most answers are the same but for rounding, which may tip an expert of some."""
    assert got.shape == want.shape
    off = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)
    assert off.median() < 0.05


@pytest.fixture
def calls(monkeypatch):
    """How many native calls were made of how many layers."""
    made, own = Counter(), NativeLayers.decode

    def counted(native, *args):
        made[len(native.parts)] += 1
        return own(native, *args)

    monkeypatch.setattr(NativeLayers, "decode", counted)
    return made


@family_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_stack_its_layers_and_their_parts_answer_alike(family, bits, dtype, tiny_ids, calls):
    model = lean_model(family, bits, dtype)
    assert len(leans(model, LeanStack)) == 1
    assert [lean_of(layer).whole for layer in leans(model, LeanLayer)] == [True, True]
    calls.clear()  # of the trials
    got = stepped(model, tiny_ids)
    assert calls == {2: 7}
    layers, parts = without(model, LeanStack), without(model, LeanStack, LeanLayer)
    assert stepped(layers, tiny_ids).equal(got)
    assert calls == {2: 7, 1: 14}
    assert stepped(parts, tiny_ids).equal(got)
    assert calls == {2: 7, 1: 14}
    close(got, stepped(bare(model), tiny_ids))


@family_of_each
@pytest.mark.parametrize("batch", [1, 2])
def test_generate_is_one_call_a_token_and_the_same(family, batch, tiny_ids, calls):
    model = lean_model(family)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings["attention_mask"] = torch.ones_like(tiny_ids[:batch])
    calls.clear()
    got = model.generate(tiny_ids[:batch], **settings)
    assert calls == {2: 11}
    for other in (without(model, LeanStack), without(model, LeanStack, LeanLayer)):
        assert other.generate(tiny_ids[:batch], **settings).equal(got)


def masked(ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return mask


GENERATED = {
    "padding": lambda ids: {"attention_mask": masked(ids)},
    "hidden states": lambda _: {"output_hidden_states": True, "return_dict_in_generate": True},
}


@family_of_each
@pytest.mark.parametrize("settings", GENERATED.values(), ids=GENERATED)
def test_what_is_asked_of_generate_is_given(family, settings, tiny_ids):
    model = lean_model(family)
    parts = without(model, LeanStack, LeanLayer)
    settings = settings(tiny_ids) | {"max_new_tokens": 5, "do_sample": False}
    got, want = (each.generate(tiny_ids, **settings) for each in (model, parts))
    if torch.is_tensor(got):
        assert got.equal(want)
        return
    assert got.keys() == want.keys()
    flat = [[t for step in each.hidden_states for t in step] for each in (got, want)]
    assert all(mine.equal(own) for mine, own in zip(*flat, strict=True))


@family_of_each
def test_beams_reorder_the_cache(family, tiny_ids, calls):
    model = lean_model(family)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    calls.clear()
    got = model.generate(tiny_ids, **settings)
    assert calls[2] > 2
    assert without(model, LeanStack, LeanLayer).generate(tiny_ids, **settings).equal(got)


def embedded(model, token):
    return {"inputs_embeds": model.get_input_embeddings()(token)}


# how a token is given, and which of the answer's parts then count
ASKED = {
    "padding": lambda _, t: {"input_ids": t, "attention_mask": masked(torch.ones(2, 6).long())},
    "a mask of its own": lambda _, t: {"input_ids": t, "attention_mask": torch.zeros(2, 1, 1, 6)},
    "embeddings": embedded,
    "hidden states": lambda _, t: {"input_ids": t, "output_hidden_states": True},
    "router logits": lambda _, t: {"input_ids": t, "output_router_logits": True},
    "places": lambda _, t: {"input_ids": t, "position_ids": torch.tensor([[7], [9]])},
    "a tuple": lambda _, t: {"input_ids": t, "return_dict": False},
    "no cache": lambda _, t: {"input_ids": t, "use_cache": False},
    "two tokens": lambda _, t: {"input_ids": t.repeat(1, 2)},
}


def flat(answer):
    """The tensors of a model's answer, in order."""
    values = answer.values() if isinstance(answer, dict) else answer
    kept = [each for each in values if isinstance(each, torch.Tensor | tuple)]
    return [t for each in kept for t in (each if isinstance(each, tuple) else [each])]


@family_of_each
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@torch.inference_mode()
def test_whoever_asks_for_more_gets_it(family, ask, tiny_ids):
    answers, types = [], []
    for each in (lean_model(family), without(opened(family), LeanStack, LeanLayer)):
        past = each(tiny_ids[:, :PROMPT]).past_key_values
        given = {"use_cache": True, "past_key_values": past}
        answers.append(each(**given | ask(each, tiny_ids[:, PROMPT : PROMPT + 1])))
        answers[-1] = answers[-1], each(tiny_ids[:, -1:], past_key_values=past)
        types.append([type(answer) for answer in answers[-1]])
    assert types[0] == types[1]
    for got, want in zip(*answers, strict=True):
        assert len(got) == len(want)
        assert all(mine.equal(own) for mine, own in zip(flat(got), flat(want), strict=True))


def test_many_sequences_are_the_stock_code(calls):
    model, ids = lean_model("olmoe"), torch.arange(9 * 8).view(9, 8)
    parts = without(model, LeanStack, LeanLayer)
    calls.clear()
    assert stepped(model, ids).equal(stepped(parts, ids))
    assert not calls
    assert stepped(model, ids[:8]).equal(stepped(parts, ids[:8]))
    assert calls == {2: 3}


def test_a_window_shorter_than_the_text(tiny_ids):
    model = lean_model("mixtral", sliding_window=4)
    assert not leans(model, LeanStack)
    got = stepped(model, tiny_ids)
    assert got.equal(stepped(without(model, LeanLayer), tiny_ids))
    close(got, stepped(bare(model), tiny_ids))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch": through_torch,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_a_copy_decodes_by_itself(way, tiny_ids):
    model = lean_model("qwen3_moe")
    want = stepped(model, tiny_ids)
    copied = way(model)
    assert len(leans(copied, LeanStack)) == 1
    assert stepped(copied, tiny_ids).equal(want)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.zero_()
    assert stepped(copied, tiny_ids).abs().max() == 0
    assert stepped(model, tiny_ids).equal(want)


def cropped(cache):
    cache.crop(-3)


def one_shorter(cache):
    for layer in cache.layers[1:]:
        layer.keys, layer.values = layer.keys[:, :, :3], layer.values[:, :, :3]


CACHES = {
    "cropped": cropped,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "one layer shorter": one_shorter,
    "copied": lambda cache: deepcopy(cache),
    "nothing": lambda cache: None,
}


@pytest.mark.parametrize("change", CACHES.values(), ids=CACHES)
@torch.inference_mode()
def test_caches_that_are_changed_and_taken_in_turn(change, tiny_ids):
    answers = []
    for model in variants(lean_model("qwen3_moe")):
        caches = [DynamicCache(), DynamicCache(config=model.config)]  # the caller's own
        logits = [
            model(tiny_ids[:, i : i + 3], past_key_values=c).logits[:, -1:]
            for i, c in enumerate(caches)
        ]
        for position in range(5, 11):
            for i, c in enumerate(caches):
                token = tiny_ids[:, position + i : position + i + 1]
                logits.append(model(token, past_key_values=c).logits)
            if position == 7:
                caches[0] = change(caches[0]) or caches[0]
        answers.append(torch.cat(logits))
    assert answers[1].equal(answers[2])
    assert answers[0].equal(answers[2])
