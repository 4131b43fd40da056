"""Additive attention: context vectors, weights and scores of a small network on pairs."""

from .api import additive_attention, additive_scores

__all__ = ["additive_attention", "additive_scores"]
