"""Every family that is read opens packed: its tiny model computes what it computes unpacked."""

import pytest
import tiny_families
import torch
from tiny_families import tiny_family

import expertly
from expertly.errors import ExpertlyError
from expertly.families import FAMILIES
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.loading import save_model
from expertly.models.packing import experts_modules, is_packed

UNSEEN = ("llama4_text", "llama4", "step3p7", "switch_transformers")  # no seam for their experts
READ = [name for name in FAMILIES if name not in UNSEEN]
# families whose files hold experts in one tensor, which the packed format cannot say
FUSED = {
    *("gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid"),
    *("aria_text", "aria", "gemma4_text", "gemma4", "qwen3_vl_moe", "hy_v4", "inkling2_text"),
    *("inkling2", "muse_spark", "minimax_m3_vl_text", "mistral4"),
}
# sizes that groups of 32 do not divide -> some that they do; but not those that count something
DIVIDED = {8: 32, 16: 32, 24: 32, 32: 64, 48: 96}
COUNTS = ("topk", "top_k", "window", "layer", "position", "num", "n_heads", "groups", "routed")
each_family = pytest.mark.parametrize("family", READ)


@torch.no_grad()
def output_of(model, ids):
    return model(ids, use_cache=False)[0].float()


def error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@each_family
def test_16_bits_equal_stock_bfloat16_and_are_saved_as_they_were(family, tmp_path, tiny_ids):
    model = tiny_family(family).bfloat16()
    save_model(model, tmp_path / "model")
    wide = {"dtype": torch.float32}
    exact = output_of(
        expertly.open_model(tmp_path / "model", experts_implementation="eager", **wide), tiny_ids
    )
    packed = expertly.open_model(tmp_path / "model", bits=16, **wide)
    assert all(hasattr(experts, "packed") for experts in experts_modules(packed).values())
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert error(output_of(packed, tiny_ids), exact) < 1e-5
    packed = expertly.open_model(tmp_path / "model", bits=16)
    # in bfloat16 what comes out of a matrix is rounded, and an undecided router changes its mind
    assert error(output_of(packed, tiny_ids), exact) < 0.4
    save_model(packed, tmp_path / "again")
    again = expertly.open_model(tmp_path / "again")
    assert not is_packed(again)
    before = model.state_dict()
    assert all(before[name].equal(tensor) for name, tensor in again.state_dict().items())


def widen(sizes):
    for key, value in sizes.items():
        counts = any(word in key for word in COUNTS) or not isinstance(value, int)
        if not counts and value in DIVIDED and key != "max_seq_len":
            sizes[key] = DIVIDED[value]
    return sizes


@pytest.fixture
def wide(monkeypatch):
    """Tiny models whose widths groups of 32 divide."""
    monkeypatch.setattr(tiny_families, "SMALL", widen(dict(tiny_families.SMALL)))
    patches = {name: widen(dict(sizes)) for name, sizes in tiny_families.PATCHES.items()}
    patches["mistral4"] = {"head_dim": 64}
    monkeypatch.setattr(tiny_families, "PATCHES", patches)


@each_family
def test_8_bits_run_and_are_saved_where_the_format_can_say_them(family, wide, tmp_path, tiny_ids):
    model = tiny_family(family)
    save_model(model, tmp_path / "model")
    packed = expertly.open_model(tmp_path / "model", bits=8)
    ours = output_of(packed, tiny_ids)
    # tiny random routers are undecided, and change their mind at any rounding
    assert error(ours, output_of(model, tiny_ids)) < 0.6
    if family in FUSED:
        with pytest.raises(ExpertlyError) as refusal:
            save_model(packed, tmp_path / "packed")
        assert refusal.value.code == "E306" and "experts" in str(refusal.value)
        assert not (tmp_path / "packed").exists()
        return
    save_model(packed, tmp_path / "packed")
    assert output_of(expertly.open_model(tmp_path / "packed"), tiny_ids).equal(ours)
