"""Bias, activation, gate and dropout after a matrix product."""

from .api import bias_activation_dropout

__all__ = ["bias_activation_dropout"]
