"""upcycle: a dense model becomes an MoE of the same function, with proof."""
