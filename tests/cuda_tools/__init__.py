"""Tools for the CUDA kernels that need nvcc and no GPU."""
