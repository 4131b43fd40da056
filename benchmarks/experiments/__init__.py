"""Experiments on generated tasks, and pictures of attention; see docs/experiments.md."""
