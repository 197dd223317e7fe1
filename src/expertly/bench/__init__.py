"""Measure this machine and this model."""
