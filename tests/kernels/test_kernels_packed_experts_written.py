"""Packed experts are filled: projection by projection, expert by expert, or not at all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_kernels_packed_experts import (
    DIM,
    EXPERTS,
    HIDDEN,
    KINDS,
    each_bits,
    each_kind,
    inputs,
    make,
    packed_copy,
)

import expertly.kernels.packed_experts as module
from expertly.errors import ExpertlyError
from expertly.kernels.experts import experts_forward
from expertly.kernels.packed_experts import (
    Sizes,
    empty_experts,
    pack_experts,
    replace_experts,
    sizes_of,
    split_gate,
)


@each_bits
@each_kind
def test_projections_may_arrive_one_expert_at_a_time(bits, kind):
    experts = make(kind)
    whole = pack_experts(experts, bits)
    pieces = empty_experts(sizes_of(experts), bits)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    inner, down = getattr(experts, up), experts.down_proj
    if experts.is_transposed:
        inner, down = inner.mT, down.mT
    dense = {**split_gate(experts, inner), "down": down}
    for name, weight in dense.items():
        for expert in range(EXPERTS):
            pieces.write(name, weight[expert], expert)
    for part in ("gate_up", "down"):
        assert torch.equal(getattr(pieces, part).data, getattr(whole, part).data)


def test_whole_stacks_are_not_copied_to_be_packed(monkeypatch):
    padded, pad = [], F.pad
    monkeypatch.setattr(module.F, "pad", lambda x, by: padded.append(x.numel()) or pad(x, by))
    packed = empty_experts(Sizes(EXPERTS, DIM, 40), 16)
    packed.write("up", torch.ones(EXPERTS, 40, DIM))
    packed.write("down", torch.ones(EXPERTS, DIM, 40))
    assert padded and max(padded) <= DIM * 48, "one matrix at most"


@each_bits
@pytest.mark.parametrize(
    ("name", "shape", "expert"),
    [
        pytest.param("gate", (EXPERTS, 2 * HIDDEN, DIM), None, id="gate over up"),
        pytest.param("up", (HIDDEN, DIM + 32), 0, id="wide"),
        pytest.param("down", (DIM, HIDDEN + 1), 0, id="wide down"),
        pytest.param("down", (DIM, HIDDEN - 1), 0, id="narrow down"),
        pytest.param("up", (EXPERTS - 1, HIDDEN, DIM), None, id="an expert short"),
        pytest.param("up", (EXPERTS, HIDDEN, DIM), 0, id="a stack for one"),
    ],
)
def test_a_projection_of_another_shape_is_refused(bits, name, shape, expert):
    packed = empty_experts(Sizes(EXPERTS, DIM, HIDDEN), bits)
    with pytest.raises(ExpertlyError, match=rf"E301\] {name}_proj: found .*, expected"):
        packed.write(name, torch.ones(shape), expert)
    assert not packed.gate_up.data.any() and not packed.down.data.any()


def test_a_bias_of_another_shape_is_refused():
    packed = empty_experts(Sizes(EXPERTS, DIM, HIDDEN, biased=True), 4)
    with pytest.raises(ExpertlyError, match=r"E301\] gate_proj_bias: found"):
        packed.write_bias("gate", torch.ones(EXPERTS, 2 * HIDDEN))
    assert not packed.gate_up_bias.any()


def test_packing_takes_the_place_of_the_parameters():
    for kind in KINDS:
        experts = make(kind)
        replace_experts(experts, pack_experts(experts, 4))
        assert not list(experts.parameters())
        assert {name.split(".")[0] for name in experts.state_dict()} == {"packed"}
        assert repr(experts.packed) == (
            f"PackedExperts(num_experts={EXPERTS}, dim={DIM}, hidden={HIDDEN}, "
            "bits=4, group_size=32)"
        )


def test_casting_the_model_leaves_the_bits(path):
    experts, _ = packed_copy(make("gpt_oss"), 4)
    given = inputs()
    out = experts_forward(experts, *given)
    assert torch.equal(experts_forward(copy.deepcopy(experts).bfloat16(), *given), out)


def test_widths_that_no_group_divides_and_bad_weights_are_refused():
    with pytest.raises(ExpertlyError, match="an input width of 40 does not divide"):
        pack_experts(make("mixtral", intermediate_size=40), 4)
    with pytest.raises(ExpertlyError, match="an input width of 100 does not divide"):
        empty_experts(Sizes(2, 100, 64), 8)
    experts = make("gpt_oss")
    experts.down_proj.data[3, 0, 0] = torch.nan
    said = "down_proj of expert 3: 1 of 6144 values are not finite"
    with pytest.raises(ExpertlyError, match=said):
        pack_experts(experts, 4)
