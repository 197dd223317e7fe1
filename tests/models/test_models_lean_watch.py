"""A watch sees every change to modules that native code passes by."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from expertly.models.lean_watch import Watch


class Part(nn.Module):
    """A linear, a buffer, settings and a config."""

    def __init__(self, config):
        super().__init__()
        self.config, self.eps, self.act = config, 1e-6, nn.SiLU()
        self.function = torch.relu
        self.linear = nn.Linear(3, 2)
        self.register_parameter("none", None)
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("one", torch.zeros(1))


class Whole(nn.Module):
    """Two parts in a list, and a child that is called."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(act="silu", top_k=2, window=None)
        self.layers = nn.ModuleList([Part(self.config), Part(self.config)])
        self.called, self.scale = nn.Linear(2, 2), 1.0


@pytest.fixture
def whole():
    return Whole()


@pytest.fixture
def watch(whole):
    watch = Watch(whole, [whole.layers])
    assert watch.unchanged()
    return watch


def parameter(*shape, **kinds):
    return nn.Parameter(torch.zeros(shape, **kinds))


def assign(name, value):
    """A change: an attribute of the second part, or of what is in it."""
    *path, last = name.split(".")

    def change(whole):
        setattr(whole.layers[1].get_submodule(".".join(path)), last, value())

    return change


def new_data(name, shape, **kinds):
    def change(whole):
        *path, last = name.split(".")
        owner = whole.layers[1].get_submodule(".".join(path))
        getattr(owner, last).data = torch.ones(shape, **kinds)

    return change


CHANGES = {
    "a setting": assign("eps", lambda: 1e-5),
    "a setting of another type": assign("eps", lambda: None),
    "a new setting": assign("offset", lambda: 1),
    "training": lambda whole: whole.layers[1].eval(),
    "training of one inside": lambda whole: whole.layers[1].linear.eval(),
    "a function": assign("function", lambda: torch.tanh),
    "a forward": assign("forward", lambda: torch.relu),
    "a forward inside": assign("linear.forward", lambda: torch.relu),
    "a child": assign("linear", lambda: nn.Linear(3, 2)),
    "a child of another kind": assign("act", nn.Identity),
    "a child less": lambda whole: delattr(whole.layers[1], "linear"),
    "a layer": lambda whole: whole.layers.__setitem__(0, Part(whole.config)),
    "a layer less": lambda whole: whole.layers.__delitem__(0),
    "a layer more": lambda whole: whole.layers.append(Part(whole.config)),
    "the layers turned": lambda whole: setattr(whole, "layers", nn.ModuleList(whole.layers[::-1])),
    "a parameter": assign("linear.weight", lambda: parameter(2, 3)),
    "a parameter of another shape": assign("linear.weight", lambda: parameter(2, 4)),
    "a parameter of another dtype": assign(
        "linear.weight", lambda: parameter(2, 3, dtype=torch.float64)
    ),
    "a parameter where none was": assign("none", lambda: parameter(2)),
    "no parameter": assign("linear.bias", lambda: None),
    "a parameter less": lambda whole: delattr(whole.layers[1].linear, "bias"),
    "data": new_data("linear.weight", (2, 3)),
    "data of another dtype": new_data("linear.weight", (2, 3), dtype=torch.float64),
    "a buffer": assign("bias", lambda: torch.zeros(2)),
    "a buffer's data": new_data("bias", 2),
    "no buffer": assign("bias", lambda: None),
    "another number": assign("one", lambda: torch.ones(1)),
    "another dtype": lambda whole: whole.layers[1].to(torch.float64),
    "memory shared": lambda whole: whole.layers[1].linear.share_memory(),
    "a config's value": lambda whole: setattr(whole.config, "top_k", 3),
    "a config's new value": lambda whole: setattr(whole.config, "clip", 1.0),
    "a config": assign("config", lambda: SimpleNamespace(act="silu")),
    "a setting of the caller": lambda whole: setattr(whole, "scale", 2.0),
    "a new setting of the caller": lambda whole: setattr(whole, "factor", 2.0),
    "a child that is called": lambda whole: setattr(whole, "called", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, whole, watch):
    change(whole)
    assert watch.unchanged() is False
    assert Watch(whole, [whole.layers]).unchanged()  # as it is now


@pytest.mark.parametrize("name", ["", "0", "1", "1.linear", "1.act"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_is_seen_until_it_is_gone(register, name, whole, watch):
    handle = getattr(whole.layers.get_submodule(name), register)(lambda *_: None)
    assert not watch.unchanged()
    handle.remove()
    assert watch.unchanged()


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_of_all_modules_is_seen_until_it_is_gone(kind, watch):
    handle = getattr(torch_module, f"register_module_{kind}")(lambda *_: None)
    try:
        assert not watch.unchanged()
    finally:
        handle.remove()
    assert watch.unchanged()


@torch.no_grad()
def test_other_values_in_the_same_place_are_no_change(whole, watch):
    for tensor in (*whole.parameters(), *whole.buffers()):
        tensor.fill_(2)
    whole.load_state_dict({name: t * 2 for name, t in whole.state_dict().items()})
    assert watch.unchanged()


def test_what_is_called_may_change_and_be_watched(whole, watch):
    whole.called.weight = parameter(2, 2)
    whole.called.register_forward_hook(lambda *_: None)
    assert watch.unchanged()


def test_a_value_that_is_put_back_is_no_change(whole, watch):
    kept, whole.layers[0].linear = whole.layers[0].linear, nn.Identity()
    assert not watch.unchanged()
    whole.layers[0].linear = kept
    assert watch.unchanged()


def test_a_tensor_among_the_settings_may_be_swapped(whole):
    whole.layers[0].held = [torch.ones(3)]
    whole.layers[0].__dict__["table"] = torch.ones(3)
    watch = Watch(whole, [whole.layers])
    assert watch.unchanged()
    whole.layers[0].__dict__["table"] = torch.ones(3)
    assert not watch.unchanged()
    whole.layers[0].__dict__["table"] = torch.ones(4)
    assert not watch.unchanged()


def test_modules_without_anything_in_them():
    caller, inner = nn.Module(), nn.Module()
    watch = Watch(caller, [inner])
    assert watch.unchanged()
    inner.register_forward_hook(lambda *_: None)
    assert not watch.unchanged()
