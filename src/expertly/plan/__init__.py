"""Plan: will it fit, how fast, what does it cost, MoE or dense? Arithmetic alone: no torch."""
