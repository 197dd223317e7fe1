"""A record of a router's counts: shares, and what the load does not say."""

import json

import torch

from expertly.watch.records import finite
from expertly.watch.snapshots import shares, snapshot
from expertly.watch.stats import LayerCounts


def test_loads_are_shares_and_a_layer_without_a_token_has_none():
    load = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    assert shares(load) == [[0.25, 0.75], [0.0, 0.0]]


def test_a_record_holds_load_mass_and_what_else_is_per_layer():
    load = torch.tensor([[2.0, 6.0]], dtype=torch.float64)
    chosen = torch.tensor([[2.0, 8.0]], dtype=torch.float64)
    one = torch.tensor([4.0], dtype=torch.float64)
    counts = LayerCounts(load, chosen, load[:, [1, 0]], one, one, load, 0 * one + 8.0)
    said = snapshot(counts, torch.tensor([[1.5, float("nan")]]))
    assert said["load"] == [[0.25, 0.75]]
    assert said["mass"] == [[0.75, 0.25]]
    assert said["layers"]["router_confidence"] == [0.5]
    assert said["layers"]["dropped_frac"] == [0.2]
    assert json.loads(json.dumps(finite(said)))["norms"] == [[1.5, None]]
    assert "norms" not in snapshot(counts, None)
