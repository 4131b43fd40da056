"""The tests that every op must pass, over its backends, cases and dtypes.

    class TestAttention(OpSuite):
        op = "attention"

`tests/ops/conftest.py` parametrises them: on the CPU always, on a GPU as well where there is one.
A backend that refuses a case must be announced in `refusals`, or in `refused_dtypes`; nothing is
skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.ops._cases import Case
from fused_attn.validation import case_inputs, check_case, op_cases, run_case

GUARD = 64


class OpSuite:
    op: ClassVar[str]
    refusals: ClassVar[frozenset[tuple[str, str]]] = frozenset()
    """(backend, case) pairs that the backend says it cannot run; exactly these refuse."""
    refused_dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {}
    """By backend, dtypes in which it says that it cannot run any case."""
    interpreted: ClassVar[frozenset[str]] = frozenset()
    """The cases that run where Triton is interpreted, which takes long; empty: all."""

    @classmethod
    def refuses(cls, backend: str, case: Case, dtype: torch.dtype) -> bool:
        """Whether the backend is announced to refuse the case."""
        return (backend, case.name) in cls.refusals or dtype in cls.refused_dtypes.get(backend, ())

    @classmethod
    def runnable_dtypes(cls, backend: str, case: Case) -> list[torch.dtype]:
        """The case's dtypes without those that the backend refuses."""
        return [dtype for dtype in case.dtypes if not cls.refuses(backend, case, dtype)]

    def test_matches_the_oracle(
        self, case: Case, dtype: torch.dtype, backend: str, device: str
    ) -> None:
        if self.refuses(backend, case, dtype):
            with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run"):
                run_case(case, case_inputs(case, dtype, device), backend)
            return
        comparisons = check_case(case, backend, dtype, device)
        assert comparisons
        failed = [str(c) for c in comparisons if not c.passed]
        assert not failed, "\n".join(failed)

    def test_repeats_bit_for_bit_from_poisoned_buffers(
        self, runnable_case: Case, backend: str, device: str
    ) -> None:
        dtype = self.runnable_dtypes(backend, runnable_case)[0]
        inputs = case_inputs(runnable_case, dtype, device)
        first = run_case(runnable_case, inputs, backend)
        with poisoned_allocations():
            second = run_case(runnable_case, inputs, backend)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert_bit_equal(name, tensor, second[name])

    def test_stays_inside_its_tensors(self, runnable_case: Case, backend: str, device: str) -> None:
        dtype = self.runnable_dtypes(backend, runnable_case)[-1]
        inputs = case_inputs(runnable_case, dtype, device)
        guarded, intact = with_guard_zones(inputs)
        expected = run_case(runnable_case, inputs, backend)
        with GuardedAllocations() as allocations:
            actual = run_case(runnable_case, guarded, backend)
        for name, tensor in expected.items():
            assert_bit_equal(name, tensor, actual[name])
        intact()
        assert allocations.count > 0, "no allocation of the kernel was seen"
        allocations.assert_intact()

    def test_opcheck(self, typical_case: Case, backend: str, device: str) -> None:
        dtype = self.runnable_dtypes(backend, typical_case)[0]
        for inputs in (
            case_inputs(typical_case, dtype, device),
            permuted(case_inputs(typical_case, dtype, device)),
        ):
            with RecordFusedCalls() as recorder:
                run_case(typical_case, inputs, backend)
            assert recorder.calls, "the backend does not go through a fused_attn operator"
            for operator, arguments in recorder.calls:
                torch.library.opcheck(operator, arguments)

    def test_compiles_without_graph_breaks(
        self, typical_case: Case, backend: str, device: str
    ) -> None:
        dtype = self.runnable_dtypes(backend, typical_case)[0]
        inputs = case_inputs(typical_case, dtype, device)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda call: typical_case.run(call, backend),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        leaves = {
            name: inputs[name].clone().requires_grad_()
            for name in typical_case.differentiable
            if isinstance(inputs.get(name), Tensor)
        }
        outputs = compiled({**inputs, **leaves})
        expected = typical_case.run({**inputs, **leaves}, backend)
        for i, (output, other) in enumerate(zip(outputs, expected, strict=True)):
            assert_bit_equal(f"output {i}", output, other)
        if leaves:
            total = sum(o.float().square().sum() for o in outputs if o.requires_grad)
            other = sum(o.float().square().sum() for o in expected if o.requires_grad)
            got = torch.autograd.grad(total, list(leaves.values()))
            want = torch.autograd.grad(other, list(leaves.values()))
            for name, a, b in zip(leaves, got, want, strict=True):
                assert_bit_equal(f"gradient of {name}", a, b)

    def test_fused_backend_refuses_fp64(
        self, typical_case: Case, backend: str, device: str
    ) -> None:
        inputs = case_inputs(typical_case, torch.float64, device)
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run"):
            typical_case.run(inputs, backend)

    def test_reference_gradcheck(self) -> None:
        if not any(case.differentiable for case in op_cases(self.op)):
            return
        cases = [case for case in op_cases(self.op) if case.gradcheck]
        assert cases, "mark some small smooth case with gradcheck=True"
        for case in cases:
            inputs = case_inputs(case, torch.float64, "cpu")
            names = [n for n in case.differentiable if isinstance(inputs.get(n), Tensor)]

            def run(
                *leaves: Tensor,
                case: Case = case,
                inputs: dict[str, Any] = inputs,
                names: list[str] = names,
            ) -> tuple[Tensor, ...]:
                outputs = case.run({**inputs, **dict(zip(names, leaves, strict=True))}, "reference")
                # Differences of -inf, an lse of nothing, are NaN.
                return tuple(o.masked_fill(o.isinf(), 0.0) for o in outputs if o.requires_grad)

            leaves = [inputs[n].clone().requires_grad_() for n in names]
            assert torch.autograd.gradcheck(run, leaves), case.name


class RecordFusedCalls(TorchDispatchMode):
    """Records calls of the project's registered operators, with detached arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "fused_attn":
            bound = list(args)
            for argument in func._schema.arguments[len(args) :]:
                bound.append((kwargs or {}).get(argument.name, argument.default_value))
            self.calls.append(
                (func, tuple(a.detach() if isinstance(a, Tensor) else a for a in bound))
            )
        return func(*args, **(kwargs or {}))


class poisoned_allocations:  # noqa: N801 (reads like a function)
    """Fills every freshly allocated tensor with NaN, or the largest integer."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)


class GuardedAllocations(TorchDispatchMode):
    """Puts every tensor that is allocated inside fused_attn's operators between zones of NaN.

    A mode is off while it handles an operator, and would not see what a kernel allocates; so a
    kernel is called below the mode, with the mode on.
    """

    _KERNELS: ClassVar[dict[str, torch._C.DispatchKey]] = {
        "cpu": torch._C.DispatchKey.CPU,
        "cuda": torch._C.DispatchKey.CUDA,
    }

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []
        self.inside = False
        self.count = 0
        """Allocations seen, empty ones too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("fused_attn", "fused_attn_C", "fused_attn_cuda_host"):
            tensors = [a for a in args if isinstance(a, Tensor)]
            keys = torch._C.DispatchKeySet(self._KERNELS[tensors[0].device.type])
            before, self.inside = self.inside, True
            try:
                with self:
                    return func.redispatch(keys, *args, **kwargs)
            finally:
                self.inside = before
        result = func(*args, **kwargs)
        if not self.inside or func.overloadpacket._qualified_op_name not in (
            "aten::empty",
            "aten::new_empty",
            "aten::empty_like",
            "aten::empty_strided",
            "aten::zeros",
            "aten::new_zeros",
        ):
            return result
        return self.guard(result)

    def guard(self, tensor: Tensor) -> Tensor:
        self.count += 1
        if tensor.numel() == 0:
            return tensor
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        buffer = torch.empty(extent + 2 * GUARD, dtype=tensor.dtype, device=tensor.device)
        _fill_with_garbage(buffer)
        self.buffers.append((buffer, extent))
        view = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
        return view.copy_(tensor)

    def assert_intact(self) -> None:
        """Raise AssertionError if something was written to a zone."""
        for buffer, extent in self.buffers:
            untouched = torch.empty_like(buffer)
            _fill_with_garbage(untouched)
            for zone in (slice(0, GUARD), slice(GUARD + extent, None)):
                assert_bit_equal("memory around a result", buffer[zone], untouched[zone])


def _fill_with_garbage(buffer: Tensor) -> None:
    if buffer.is_floating_point():
        buffer.fill_(float("nan"))
    elif buffer.dtype == torch.bool:
        buffer.fill_(True)
    else:
        buffer.fill_(torch.iinfo(buffer.dtype).max)


def permuted(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values with the first two of several dimensions laid out the other way round."""

    def permute(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point():
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        return value

    return {name: permute(value) for name, value in inputs.items()}


def with_guard_zones(inputs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """The same values and strides inside larger buffers, and a check that these are untouched."""
    buffers: list[tuple[str, Tensor, Tensor]] = []

    def guard(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        buffer = torch.empty(extent + 2 * GUARD, dtype=value.dtype, device=value.device)
        _fill_with_garbage(buffer)
        view = buffer.as_strided(value.shape, value.stride(), GUARD)
        # Expanded dimensions share memory; writing one copy of them is enough.
        first = tuple(slice(0, 1) if s == 0 else slice(None) for s in value.stride())
        view[first].copy_(value[first])
        buffers.append((name, buffer, buffer.clone()))
        return view

    guarded = {name: guard(name, value) for name, value in inputs.items()}

    def intact() -> None:
        for name, buffer, before in buffers:
            assert_bit_equal(f"memory around {name}", buffer, before)

    return guarded, intact


def assert_bit_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    __tracebackhide__ = True
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape, name
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} elements differ"
