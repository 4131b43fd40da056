"""Testing Triton kernels without a GPU: interpreted on the CPU, and compiled ahead of time."""
