"""Train an MoE, or its dense twin, on text: one loop, exact accumulation, exact resume."""
