"""Where there is no GPU, Triton kernels run in Triton's interpreter and CUDA kernels on the host.

Triton's variable must be set before anything imports triton, since kernels are decorated then; it
is never set on a machine with a GPU. Child processes inherit it: a test that starts one which must
see the machine as a user does removes it (`benchmarks.static.triton` does).
"""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"

    from tests.triton_tools import interpreter

    interpreter.repair()

if not torch.cuda.is_available() and "FUSED_ATTN_CUDA_HOST" not in os.environ:
    from tests.cuda_host import build as cuda_host

    if cuda_host.missing() == "":
        os.environ["FUSED_ATTN_CUDA_HOST"] = str(cuda_host.build())

if importlib.util.find_spec("hypothesis") is None:
    from tests import without_hypothesis

    without_hypothesis.install()
else:
    import hypothesis

    # A fixed budget of fixed examples; `--hypothesis-profile=long` searches for new ones, and for
    # the smallest that fail, which takes minutes.
    phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.shrink]
    hypothesis.settings.register_profile(
        "fixed", max_examples=60, deadline=None, derandomize=True, phases=phases
    )
    hypothesis.settings.register_profile("long", max_examples=3000, deadline=None)
    hypothesis.settings.load_profile("fixed")
