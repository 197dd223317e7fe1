"""An audit: what a model's routers do with some text, counted as in training; drift; alarms."""

import pytest
import torch

from expertly.errors import ExpertlyError
from expertly.models.attach import attach
from expertly.models.layers import moe_layers
from expertly.watch.audit import Text, audit, look

ROWS = {
    "code": Text(torch.randint(1, 150, (9, 24), generator=torch.Generator().manual_seed(1))),
    "docs": Text(torch.randint(150, 300, (5, 16), generator=torch.Generator().manual_seed(2))),
}


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_load_is_a_slow_loops(tiny_model, family):
    model = tiny_model(family)
    seen = look(model, ROWS, quiet)
    slow = {name: torch.zeros(2, 8) for name in ROWS}
    with attach(model) as attachment, torch.no_grad():
        for name, text in ROWS.items():
            for row in text.ids:
                model(row.unsqueeze(0))
                for layer, decision in enumerate(attachment.decisions):
                    for expert in decision.served.experts.flatten().tolist():
                        slow[name][layer, expert] += 1
    for name in ROWS:
        assert torch.equal(seen.counts[name].load.float(), slow[name]), name
    assert seen.total.tokens.tolist() == 2 * [9 * 24 + 5 * 16]
    report = audit("a/b", model.config.to_dict(), seen)
    share = sum(slow.values()) / (2 * seen.total.tokens[0])
    expected = (share * 8).tolist()
    for ours, theirs in zip(report["load"][0], expected, strict=True):
        assert ours == pytest.approx(theirs, abs=6e-4)
    assert report["domains"]["names"] == ["code", "docs"]
    assert all(0 < value < 1 for value in report["domains"]["specialisation"])
    assert (report["kind"], report["steps"], report["top_k"]) == ("model", [0], 2)
    assert report["names"][0] == ("layer 0 (block 1)" if family == "deepseek_v3" else "layer 0")
    assert report["tokens"] == int(seen.total.tokens[0])


def test_looking_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    look(model, ROWS, quiet)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_silent_expert_behind_an_ordinary_load_is_found(tiny_model):
    model = tiny_model("qwen3_moe")
    clean = audit("m", model.config.to_dict(), look(model, ROWS, quiet))
    assert [alarm for alarm in clean["alarms"] if alarm["kind"] == "silent"] == []
    busiest = max(range(8), key=lambda expert: clean["load"][0][1][expert])
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj[busiest] = 0
    report = audit("m", model.config.to_dict(), look(model, ROWS, quiet))
    (alarm,) = [alarm for alarm in report["alarms"] if alarm["kind"] == "silent"]
    assert (alarm["layer"], alarm["experts"]) == (1, [busiest])
    assert report["norms"][1][busiest] == 0
    assert report["worst"][0] == 1


def test_a_dense_model_has_no_routers(tiny_sizes):
    from expertly.models.build import build_model, model_config, twin_config

    dense = build_model(twin_config(model_config("qwen3_moe", tiny_sizes("qwen3_moe"))))
    with pytest.raises(ExpertlyError, match=r"E30[56]"):
        look(dense, ROWS, quiet)
