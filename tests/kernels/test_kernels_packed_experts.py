"""Packed experts: against a double loop, the family's own code, gradients, and every way of use."""

import copy

import pytest
import torch
import torch.nn.functional as F
from packed_errors import error, tolerance
from transformers import (
    AriaTextConfig,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OpenAIPrivacyFilterConfig,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)

import expertly.kernels.packed_experts as module
from expertly.kernels.experts import experts_forward
from expertly.kernels.packed import dequantize
from expertly.kernels.packed_experts import (
    pack_experts,
    replace_experts,
)

DIM, HIDDEN, EXPERTS = 64, 96, 8
BITS = (4, 8, 16)
each_bits = pytest.mark.parametrize("bits", BITS)
SIZES = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
KINDS = {
    "mixtral": lambda act="silu", **sizes: (
        MixtralExperts,
        MixtralConfig(**{**SIZES, **sizes}, hidden_act=act),
    ),
    "gpt_oss": lambda **sizes: (GptOssExperts, GptOssConfig(**{**SIZES, **sizes})),
    "openai_privacy_filter": lambda **sizes: (
        OpenAIPrivacyFilterExperts,
        OpenAIPrivacyFilterConfig(**{**SIZES, **sizes}),
    ),
    "aria": lambda **sizes: (
        AriaExperts,
        AriaTextConfig(**{**SIZES, **sizes}, moe_num_experts=EXPERTS),
    ),
    "nemotron_h": lambda act="relu2", **sizes: (
        NemotronHExperts,
        NemotronHConfig(
            hidden_size=DIM,
            moe_intermediate_size=sizes.get("intermediate_size", HIDDEN),
            n_routed_experts=EXPERTS,
            mlp_hidden_act=act,
        ),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    """A family's experts module with random weights."""
    cls, config = KINDS[kind](**options)
    config._experts_implementation = "eager"
    experts = cls(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


def packed_copy(experts, bits, group_size=32, **form):
    """The module on packed weights, and a dense one with exactly the weights that those stand for.

    A family's own order of rows is put back here by hand.
    """
    packed = pack_experts(experts, bits, group_size, **form)
    dense, copied = copy.deepcopy(experts), copy.deepcopy(experts)
    replace_experts(copied, packed)
    copied.eval()  # in training rounding is made up for
    inner, down = dequantize(packed.gate_up), dequantize(packed.down)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden = packed.hidden
    inner = inner.unflatten(1, (1 + experts.has_gate, -1))[:, :, :hidden]
    inner = inner.flatten(1, 2) if experts.is_concatenated else inner.transpose(1, 2)
    inner = inner.reshape(EXPERTS, -1, inner.shape[-1])
    down = down[:, :, :hidden]
    with torch.no_grad():
        for name, weight in ((up, inner), ("down_proj", down)):
            getattr(dense, name).copy_(weight.mT if experts.is_transposed else weight)
    return copied, dense


def inputs(tokens=23, top_k=3, seed=1):
    """Tokens, and a routing that leaves the last expert without any."""
    torch.manual_seed(seed)
    index = torch.rand(tokens, EXPERTS - 1).topk(top_k).indices
    return torch.randn(tokens, DIM), index, torch.rand(tokens, top_k)


def double_loop(packed, x, index, weights):
    """The definition of SwiGLU experts, one token and one expert at a time."""
    gate_up, down = dequantize(packed.gate_up), dequantize(packed.down)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(index[t], weights[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out[t] += w * (down[e] @ (F.silu(gate) * up))
    return out


@each_bits
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_output_equals_the_double_loop(path, bits, tokens):
    experts, _ = packed_copy(make("mixtral"), bits)
    given = inputs(tokens)
    out = experts_forward(experts, *given)
    # the errors of few tokens do not average out
    limit = tolerance(path, bits) * (1 if tokens > 50 else 2)
    assert error(out, double_loop(experts.packed, *given)) < limit


@each_bits
@each_kind
def test_every_layout_and_gate_equals_the_familys_own_code(path, bits, kind):
    packed, dense = packed_copy(make(kind), bits)
    given = inputs()
    assert error(experts_forward(packed, *given), dense(*given)) < tolerance(path, bits)


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
@pytest.mark.parametrize("kind", ["mixtral", "nemotron_h"])
def test_activations_that_the_kernels_know(path, kind, act):
    experts, dense = packed_copy(make(kind, act=act), 16)
    assert module.known_gate(experts) is not None
    given = inputs()
    assert error(experts_forward(experts, *given), dense(*given)) < 1e-5


def test_an_activation_that_is_a_function(path):
    experts, dense = packed_copy(make("mixtral"), 16)
    for each in (experts, dense):
        each._modules.pop("act_fn")
        each.act_fn = F.silu  # as LFM2 has it
    assert module.known_gate(experts).act == "silu"
    given = inputs()
    assert error(experts_forward(experts, *given), dense(*given)) < 1e-5


@pytest.mark.parametrize("act", ["tanh", "quick_gelu", "relu6"])
@pytest.mark.parametrize("kind", ["mixtral", "nemotron_h"])
def test_activations_that_they_do_not_know_run_as_modules(path, kind, act):
    experts, dense = packed_copy(make(kind, act=act), 16)
    assert module.known_gate(experts) is None
    given = inputs()
    assert error(experts_forward(experts, *given), dense(*given)) < 1e-5


@each_kind
@pytest.mark.parametrize("hidden", [5, 33])
def test_a_width_of_any_size_at_16_bits(path, kind, hidden):
    experts, dense = packed_copy(make(kind, intermediate_size=hidden), 16)
    given = inputs()
    out = experts_forward(experts, *given)
    assert error(out, dense(*given)) < 1e-5


@pytest.mark.parametrize("zeros", [None, torch.uint8, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_group_sizes_and_zero_points(path, bits, group_size, zeros):
    cls, sizes = "mixtral", {"intermediate_size": 128}
    experts, dense = packed_copy(make(cls, **sizes), bits, group_size, zeros=zeros)
    given = inputs()
    assert error(experts_forward(experts, *given), dense(*given)) < tolerance(path, bits)


@each_bits
@each_kind
def test_gradients_of_tokens_and_weights(path, bits, kind):
    packed, dense = packed_copy(make(kind), bits)
    x, index, weights = inputs()
    x.requires_grad_(), weights.requires_grad_()
    grad = torch.randn_like(x)
    outs = experts_forward(packed, x, index, weights), dense(x, index, weights)
    pairs = [torch.autograd.grad(out, [x, weights], grad) for out in outs]
    assert error(*(out.detach() for out in outs)) < tolerance(path, bits)
    for ours, theirs in zip(*pairs, strict=True):
        # the gate's slope is taken where the rounded activations led
        assert error(ours, theirs) < max(1e-5, 2 * tolerance(path, bits))
    with torch.no_grad():
        assert error(experts_forward(packed, x, index, weights), outs[0]) < 1e-2


@each_bits
@each_kind
def test_ids_beyond_the_experts_and_weights_of_0_were_never_there(path, bits, kind):
    experts, _ = packed_copy(make(kind), bits)
    x, index, weights = inputs()
    alone = experts_forward(experts, x, index, weights)
    beyond = torch.full((len(x), 1), EXPERTS)
    garbage = torch.full((len(x), 1), 3.0)
    nothing = torch.zeros(len(x), 1)
    more = [
        (beyond, garbage),  # expert parallelism's sentinels
        (beyond + 3, garbage),
        (torch.full_like(beyond, 2), nothing),  # a dropped assignment
    ]
    for ids, weight in more:
        wide = torch.cat([index, ids], 1), torch.cat([weights, weight], 1)
        torch.testing.assert_close(experts_forward(experts, x, *wide), alone)
    with_gradient = x.clone().requires_grad_()
    wide = torch.cat([index, beyond], 1), torch.cat([weights, garbage], 1).requires_grad_()
    out = experts_forward(experts, with_gradient, *wide)
    torch.testing.assert_close(out.detach(), alone, atol=2e-2, rtol=2e-2)
    grads = torch.autograd.grad(out.sum(), [with_gradient, wide[1]])
    assert all(grad.isfinite().all() for grad in grads) and (grads[1][:, -1] == 0).all()


@each_kind
def test_nothing_for_anyone_to_do(path, kind):
    experts, _ = packed_copy(make(kind), 4)
    x, index, weights = inputs()
    assert (experts_forward(experts, x, index, 0 * weights) == 0).all()
    assert (experts_forward(experts, x, index + EXPERTS, weights) == 0).all()
    nobody = experts_forward(experts, x[:0], index[:0], weights[:0])
    assert nobody.shape == (0, DIM)
    x.requires_grad_()
    out = experts_forward(experts, x, index + EXPERTS, weights)
    assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


@each_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_went(path, bits, dtype):
    experts, _ = packed_copy(make("gpt_oss"), bits)
    x, index, weights = inputs()
    exact = experts_forward(experts, x, index, weights)
    for weight in (weights, weights.to(dtype)):
        out = experts_forward(experts, x.to(dtype), index, weight)
        assert out.dtype == dtype
        assert error(out, exact) < 2 * torch.finfo(dtype).eps + tolerance(path, bits)


def test_autocast_computes_in_its_dtype_and_answers_in_the_tokens(path):
    experts, _ = packed_copy(make("mixtral"), 8)
    x, index, weights = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = experts_forward(experts, x, index, weights)
    assert out.dtype == torch.float32
    assert error(out, experts_forward(experts, x, index, weights)) < 2e-2


def test_a_hook_on_the_activation_is_heard(path):
    # expert dropout is such a hook
    experts, _ = packed_copy(make("mixtral"), 4)
    given = inputs()
    handle = experts.act_fn.register_forward_hook(lambda module, args, output: 0 * output)
    assert (experts_forward(experts, *given) == 0).all()
    handle.remove()
    assert (experts_forward(experts, *given) != 0).any()


def test_a_norm_behind_each_expert_is_applied(path):
    experts, dense = packed_copy(make("mixtral"), 16)
    for each in (experts, dense):
        each.has_post_expert_norm, each.post_expert_norm = True, torch.nn.RMSNorm(DIM)
    given = inputs()
    out = experts_forward(experts, *given)
    assert error(out, experts_forward(dense, *given)) < 1e-5


def test_the_same_expert_twice_counts_twice(path):
    experts, _ = packed_copy(make("mixtral"), 4)
    x, index, weights = inputs(top_k=1)
    twice = experts_forward(experts, x, index.expand(-1, 2), weights.expand(-1, 2) / 2)
    torch.testing.assert_close(twice, experts_forward(experts, x, index, weights))
