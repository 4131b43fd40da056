"""GPU backends in a CUDA graph: a captured call replays on new inputs what an eager one gives."""

from __future__ import annotations

import pytest
import torch

from fused_attn.validation import OPS, op_backends, op_cases

from .suite import assert_bit_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CALLS = [
    (op, backend) for op in OPS for backend in op_backends(op) if backend in ("cuda", "triton")
]


@pytest.mark.parametrize(("op", "backend"), CALLS)
def test_replays_what_an_eager_call_computes(op: str, backend: str) -> None:
    case = next(case for case in op_cases(op) if case.kind == "typical")
    device = torch.device("cuda")
    first, second = (
        case.inputs(torch.bfloat16, device, torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    expected = [tensor.clone() for tensor in case.run(second, backend)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        case.run(first, backend)  # compiles, and loads what is loaded lazily
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = case.run(first, backend)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            value.copy_(second[name])
    graph.replay()
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_bit_equal(f"output_{index}", result, wanted)
