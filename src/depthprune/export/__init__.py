"""Pruned models as checkpoints that other engines open."""
