"""Generation: seeded, greedy at temperature 0, stops, and leaves the generators alone."""

import math
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from expertly.engine.generate import Pace, generate_ids, stream_ids
from expertly.engine.sampler import Sampling
from expertly.errors import ExpertlyError

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
PROMPT = [5, 17, 42]


@torch.no_grad()
def greedy(model, ids, count):
    made = list(ids)
    for _ in range(count):
        made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
        if made[-1] == model.config.eos_token_id:
            break
    return made[len(ids) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_0_is_the_likeliest_token_each_time(family, tiny_model):
    model = tiny_model(family)
    sampling = Sampling(max_new_tokens=8, temperature=0)
    assert generate_ids(model, PROMPT, sampling) == greedy(model, PROMPT, 8)


def test_the_seed_settles_the_text(tiny_model):
    model = tiny_model("qwen3_moe")
    texts = [generate_ids(model, PROMPT, Sampling(12, 1.5, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) <= 12


def test_it_stops_at_the_end_of_text(tiny_model):
    model = tiny_model("mixtral")
    plain = generate_ids(model, PROMPT, Sampling(8, 0))
    model.generation_config.eos_token_id = plain[3]
    stopped = generate_ids(model, PROMPT, Sampling(8, 0))
    assert stopped == plain[: plain.index(plain[3]) + 1]
    other = list(stream_ids(model, PROMPT, Sampling(8, 0), frozenset({plain[1]})))
    assert other == plain[: plain.index(plain[1]) + 1]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_global_generator_goes_on_as_if_nothing_was_drawn(temperature, tiny_model):
    model = tiny_model("mixtral")
    before = torch.get_rng_state()
    generate_ids(model, PROMPT, Sampling(4, temperature))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-6, 1.0), (1.0, 0.0), (1.0, 1e-9)])
def test_the_coldest_settings_are_greedy(temperature, top_p, tiny_model):
    model = tiny_model("olmoe")
    assert generate_ids(model, PROMPT, Sampling(5, temperature, top_p)) == greedy(model, PROMPT, 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_tokens_are_those_of_transformers(family, penalty, tiny_model):
    model = tiny_model(family)
    model.generation_config.repetition_penalty = penalty
    ids = torch.tensor([PROMPT])
    stock = model.generate(ids, do_sample=False, max_new_tokens=20)[0, len(PROMPT) :]
    assert generate_ids(model, PROMPT, Sampling(20, 0)) == stock.tolist()


def test_a_list_of_ends_is_followed(tiny_model):
    model = tiny_model("mixtral")
    plain = generate_ids(model, PROMPT, Sampling(8, 0))
    model.generation_config.eos_token_id = [299, plain[3]]
    assert generate_ids(model, PROMPT, Sampling(8, 0)) == plain[: plain.index(plain[3]) + 1]


def test_tokens_come_one_by_one(tiny_model):
    model = tiny_model("olmoe")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    stream = stream_ids(model, PROMPT, Sampling(5, 0))
    assert not calls
    for count in range(1, 4):
        next(stream)
        assert len(calls) == count
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["no_repeat_ngram_size", "min_length", "forced_eos_token_id"])
def test_what_is_not_followed_is_told(name, tiny_model, caplog):
    model = tiny_model("olmoe")
    setattr(model.generation_config, name, 2)
    generate_ids(model, PROMPT, Sampling(2, 0))
    assert name in caplog.text


def test_the_pace_counts_the_first_token_to_the_prompt():
    def slowly():
        for token in range(5):
            time.sleep(0.05 if token == 0 else 0.01)
            yield token

    pace = Pace(slowly(), prompt_tokens=7)
    assert list(pace) == [0, 1, 2, 3, 4]
    assert (pace.prompt_tokens, pace.new_tokens) == (7, 5)
    assert 10 < pace.prefill < 7 / 0.05
    assert pace.decode is not None and 5 < pace.decode < 4 / 0.04


def test_one_token_has_no_pace():
    pace = Pace(iter([1]), 1)
    assert list(pace) == [1]
    assert pace.decode is None


def seeing_model():
    """A tiny model of text and images."""
    text = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}
    text |= {"moe_intermediate_size": 16, "intermediate_size": 48, "initializer_range": 0.2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"intermediate_size": 48, "deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def test_a_model_that_sees_starts_at_the_beginning_after_other_texts():
    model = seeing_model()
    want = generate_ids(model, PROMPT, Sampling(8, 0))
    model.generate(torch.randint(1, 300, (3, 4)), do_sample=False, max_new_tokens=3)
    model.model.rope_deltas += 20  # as after images
    assert generate_ids(model, PROMPT, Sampling(8, 0)) == want


@pytest.mark.parametrize("temperature", [math.nan, -1.0, math.inf])
def test_a_temperature_that_says_nothing_is_one_line(temperature, tiny_model):
    with pytest.raises(ExpertlyError, match=r"^error\[E202\] temperature: .*FIX") as refusal:
        generate_ids(tiny_model("olmoe"), PROMPT, Sampling(2, temperature))
    assert "\n" not in str(refusal.value)


def test_a_nucleus_that_says_nothing_is_one_line(tiny_model):
    with pytest.raises(ExpertlyError, match=r"^error\[E202\] top_p"):
        generate_ids(tiny_model("olmoe"), PROMPT, Sampling(2, 1.0, math.nan))


def test_an_empty_prompt_is_one_line(tiny_model):
    with pytest.raises(ExpertlyError, match=r"^error\[E202\] prompt"):
        generate_ids(tiny_model("olmoe"), [], Sampling(2))
