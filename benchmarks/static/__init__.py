"""What compilers make of the kernels for GPUs that are not there: ``python -m benchmarks.static``.

``launches/<op>.py`` is the one list of what is compiled: calls of the op's own Triton launchers,
which the tests compile too. ``triton.py`` compiles them, ``cuda.py`` the CUDA kernels with nvcc,
``targets.py`` computes occupancy, ``table.py`` keeps the rows and ``page.py`` writes
``docs/static.md``.
"""
