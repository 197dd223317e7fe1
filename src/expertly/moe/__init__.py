"""The heart: what a router decides, how capacity limits it, what keeps it healthy. Pure torch."""
