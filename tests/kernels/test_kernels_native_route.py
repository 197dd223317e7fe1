"""The router in one native call, against a slow definition in double precision."""

import pytest
import torch

from expertly.kernels.native import library
from expertly.kernels.native_ops import RouterForm, operations

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_route(form, x, weight, bias):
    """Weights and ids by the definition, from logits in double precision."""
    logits = x.double() @ weight.double().T
    scores = logits.sigmoid() if form.score == "sigmoid" else logits.softmax(-1)
    if form.score == "softmax of the chosen":
        scores = logits
    choice = scores if bias is None else scores + bias.double()
    if form.topk_groups < form.num_groups:
        groups = choice.view(len(x), form.num_groups, -1)
        worth = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(worth).scatter(1, worth.topk(form.topk_groups).indices, 1)
        choice = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1)
    ids = choice.topk(form.top_k).indices
    weights = scores.gather(1, ids)
    if form.score == "softmax of the chosen":
        weights = weights.softmax(-1)
    if form.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + form.epsilon)
    return logits, weights * form.scale, ids


FORMS = [
    RouterForm(2),
    RouterForm(8, renormalize=True, scale=2.5),
    RouterForm(3, "softmax of the chosen"),
    RouterForm(4, "sigmoid", True, 4, 2, 1e-20, 1.5),
    RouterForm(4, "sigmoid", False, 16, 4),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (5, 96), (3, 50)])
def test_routing_is_its_definition(native, form, biased, tokens, dim):
    x, weight = random(tokens, dim, seed=0).float(), random(16, dim, seed=1).float() / 3
    bias = random(16, seed=2).float() if biased else None
    logits, weights, ids = native.route(form, x, weight, bias)
    want = slow_route(form, x, weight, bias)
    assert ids.equal(want[2])
    assert torch.allclose(logits.double(), want[0], atol=1e-4)
    assert torch.allclose(weights.double(), want[1], atol=1e-5)


def test_logits_are_rounded_where_the_family_rounds(native):
    form = RouterForm(4, exact=False, logits_dtype=torch.bfloat16, weights_dtype=torch.bfloat16)
    x, weight = random(6, 64, seed=0).bfloat16(), random(8, 64, seed=1).bfloat16()
    logits, weights, ids = native.route(form, x, weight)
    assert logits.dtype == weights.dtype == torch.bfloat16
    top = logits.float().softmax(-1).topk(4)
    assert ids.equal(top.indices)
    assert (weights.float() - top.values).abs().max() < 1e-2
    exact = native.route(form._replace(exact=True, logits_dtype=torch.float32), x, weight)[0]
    assert exact.bfloat16().equal(logits)
    assert not exact.equal(logits.float())


def test_of_equals_the_first(native):
    weight = torch.eye(8)
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0, 2.0, 0.0, 0.0]])
    assert native.route(RouterForm(5), x, weight)[2].tolist() == [[1, 2, 4, 5, 0]]


@pytest.mark.parametrize("form", [RouterForm(2), RouterForm(2, num_groups=4, topk_groups=1)])
@pytest.mark.parametrize("broken", [0, 3, 7])
def test_a_logit_that_is_no_number_is_chosen_as_torch_does(native, form, broken):
    """Only one expert's bias is NaN, so that the scores of all others are numbers."""
    x, weight, bias = torch.ones(1, 32), random(8, 32, seed=1).float(), torch.zeros(8)
    bias[broken] = torch.nan
    ids = native.route(form, x, weight, bias)[2]
    assert ids.equal(slow_route(form, x, weight, bias)[2])
    assert ids[0, 0] == broken


def test_a_router_of_nan_answers_nan(native):
    x, weight = torch.ones(1, 32), random(8, 32, seed=1).float()
    weight[5] = torch.nan
    for score in ("softmax", "sigmoid", "softmax of the chosen"):
        weights = native.route(RouterForm(2, score), x, weight)[1]
        assert weights[0, 0].isnan(), "one that is last is never seen"


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (RouterForm(9), "more experts"),
        (RouterForm(0), "more experts"),
        (RouterForm(2, num_groups=3), "groups"),
        (RouterForm(5, num_groups=4, topk_groups=2), "groups"),
        (RouterForm(2, num_groups=2, topk_groups=3), "groups"),
    ],
)
def test_bad_rules_are_refused(form, said):
    with pytest.raises(ValueError, match=said):
        operations().route(form, torch.ones(1, 32), torch.ones(8, 32))


def test_router_tensors_that_do_not_fit_are_refused():
    native, form = operations(), RouterForm(2)
    x, weight = torch.ones(2, 32), torch.ones(8, 32)
    with pytest.raises(ValueError, match="x is"):
        native.route(form, x[:, :31], weight)
    with pytest.raises(ValueError, match="contiguous"):
        native.route(form, torch.ones(32, 2).T, weight)
    with pytest.raises(ValueError, match="bias"):
        native.route(form, x, weight, torch.ones(7))
    with pytest.raises(ValueError, match="bias must be contiguous"):
        native.route(form, x, weight, torch.ones(16)[::2])
    for each in ((x.half(), weight), (x, weight.half()), (x.to("meta"), weight)):
        with pytest.raises(ValueError, match="native kernels"):
            native.route(form, *each)
    with torch.device("meta"):
        assert all(each.is_cpu for each in native.route(form, x, weight))
    assert native.route(form, x[:0], weight)[2].shape == (0, 2)
