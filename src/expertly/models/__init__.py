"""Transformers models: open, save, inspect, count, tokenize, and the seams where ours plugs in."""
