"""Router health: what the true decisions say about each layer's experts."""
