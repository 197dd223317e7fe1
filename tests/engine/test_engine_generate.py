"""Generation: seeded, greedy at temperature 0, stops, and leaves the generators alone."""

import pytest
import torch

from expertly.engine.generate import Sampling, generate_ids

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
