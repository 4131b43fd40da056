"""Executes the CUDA kernels on a CPU: docs/testing_kernels.md."""
