"""Drift: how alike two models route the same text, and what each of them loses on it."""

import pytest
import torch
import torch.nn.functional as F

from expertly.errors import ExpertlyError
from expertly.watch.audit import Text, look
from expertly.watch.drift import drift, drift_report

TEXTS = {
    "code": Text(torch.randint(1, 150, (5, 24), generator=torch.Generator().manual_seed(1))),
    "docs": Text(torch.randint(150, 300, (5, 16), generator=torch.Generator().manual_seed(2))),
}


def quiet(line: str) -> None:
    pass


def test_drift_from_itself_is_none_and_from_another_is_some(tiny_model):
    seen = look(tiny_model("olmoe"), TEXTS, quiet)
    same = drift(seen, look(tiny_model("olmoe"), TEXTS, quiet), "base")
    assert (same["overlap"], same["divergence"]) == ([1.0, 1.0], [0.0, 0.0])
    for of in same["domains"].values():
        assert of["loss"][0] == of["loss"][1] and of["confidence"][0] == of["confidence"][1]
        assert of["overlap"] == [1.0, 1.0]
    other = drift(seen, look(tiny_model("olmoe", seed=7), TEXTS, quiet), "base")
    assert all(0 < value < 0.8 for value in other["overlap"])
    assert all(0 < value < 1 for value in other["divergence"])


def test_drift_needs_models_of_the_same_make(tiny_model):
    seen = look(tiny_model("olmoe"), TEXTS, quiet)
    fewer = look(tiny_model("olmoe", num_experts=4), TEXTS, quiet)
    with pytest.raises(ExpertlyError, match=r"E305.*2 MoE layers of 4 experts"):
        drift(seen, fewer, "base")


def test_losses_are_of_the_tokens_that_count(tiny_model):
    model = tiny_model("mixtral")
    ids = TEXTS["code"].ids
    learnt = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    lost = []
    with torch.no_grad():
        for row, counts in zip(ids, learnt, strict=True):
            logits = model(row[None]).logits[0]
            for at in range(1, len(row)):
                if counts[at]:
                    lost.append(F.cross_entropy(logits[at - 1], row[at]))
    found = look(model, {"code": Text(ids, learnt)}, quiet).losses["code"]
    assert found == pytest.approx(float(torch.stack(lost).mean()), rel=1e-5)


def test_padding_behind_packed_text_is_not_routed(tiny_model):
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    ids = TEXTS["code"].ids[:1, :8]
    seen = look(tiny_model("mixtral"), {"code": Text(ids, None, places)}, quiet)
    assert seen.chosen["code"].shape[1] == 5
    assert seen.total.tokens.tolist() == [5, 5]


def test_one_model_at_a_time_is_open(tiny_model):
    order = []

    def opens(seed):
        order.append(seed)
        return tiny_model("olmoe", seed=seed)

    config = tiny_model("olmoe").config.to_dict()
    both = (lambda: opens(0), lambda: opens(7))
    report = drift_report("m", config, TEXTS, both, "base", lambda line: order.append(line))
    assert order.index(0) < order.index("code: 120 tokens") < order.index(7)
    assert set(report["drift"]["domains"]) == {"code", "docs"}
