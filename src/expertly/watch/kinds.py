"""The kinds of alarm: what is measured against which limits, and what is said. No arithmetic.

Each advice is for any model, wherever it is trained; brackets name the key of a run of ours.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of alarm."""

    limit: float  # beyond it the alarm begins
    clear: float  # back on this side of it the alarm ends
    below: bool  # whether what is too low is bad
    what: str
    advice: str


KINDS = {
    "collapse": Kind(
        0.5,
        0.35,
        False,
        "the tokens crowd onto the same experts ({figure:.2f}, where 0 is even and 1 collapsed)",
        "train on with a higher balance loss (router.router_aux_loss_coef) or bias rate "
        "(router.bias_update_rate), with a lower learning rate of the router "
        "(optim.router_learning_rate), or with a router drawn anew (router.on_collapse=rebalance)",
    ),
    "dead": Kind(
        0.01,
        0.1,
        True,
        "hardly any token is sent there ({figure:.1%} of an even share)",
        "train on with a higher balance loss (router.router_aux_loss_coef) or bias rate "
        "(router.bias_update_rate), or prune these experts",
    ),
    "silent": Kind(
        0.01,
        0.02,
        True,
        "tokens are sent there, but the answer is nothing ({figure:.2%} of the layer's median "
        "output norm)",
        "look for damaged or zeroed expert weights, else train on with a lower weight decay "
        "(optim.weight_decay); a balance loss does not see it",
    ),
    "overflow": Kind(
        0.25,
        0.15,
        False,
        "capacity drops {figure:.0%} of the assignments",
        "raise the capacity (router.capacity_factor) or the balance loss "
        "(router.router_aux_loss_coef), or reroute what is dropped (router.overflow=reroute)",
    ),
    "saturation": Kind(
        0.95,
        0.9,
        False,
        "the router is all but certain of one expert (mean highest probability {figure:.3f}), so "
        "the others hardly learn",
        "train on with a higher z-loss (router.router_z_loss_coef) or a lower learning rate of the "
        "router (optim.router_learning_rate)",
    ),
}
