"""Puts bf16 right in Triton's interpreter, which keeps a bf16 value as a uint16 of its bits.

The interpreter truncates where a GPU rounds to nearest even, and computes on the bits as if they
were integers. Here every operation on bf16 widens its operands to fp32 and rounds its result, as
the hardware does. Also, the interpreter calls the result of comparing scalars an int32, which
triton 3.9 then refuses as a mask; and triton 3.6 turns one-element arrays into integers in a way
that numpy 2.4 refuses.

And the interpreter replaces the language's functions at every call of a function inside a kernel,
which takes up to half of the time. Here it does so once a launch.

Interpreter state is global to the process; apply the repair once, before any kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(handle: TensorHandle) -> TensorHandle:
    """A bf16 handle in fp32; any other handle as it is."""
    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """The bits of fp32 values in bf16, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def repair() -> None:
    """Replace the interpreter's conversions, binary operations and dot where bf16 takes part.

    And have it replace the language's functions once a launch.
    """
    plain_cast = InterpreterBuilder.cast_impl
    plain_float_to_float = InterpreterBuilder.create_fp_to_fp
    plain_binary = InterpreterBuilder.binary_op
    plain_dot = InterpreterBuilder.create_dot
    plain_patch_tensor = interpreter._patch_lang_tensor
    plain_patch = interpreter._patch_lang
    # By their globals: the modules that see a patched language in the present launch.
    patched: set[int] = set()

    def convert(
        self: InterpreterBuilder, source: TensorHandle, target: Any, otherwise: Callable[[], Any]
    ) -> TensorHandle:
        to_bf16 = target.scalar == tl.bfloat16
        if is_bf16(source):
            return source if to_bf16 else plain_cast(self, widen(source), target)
        if to_bf16:
            if source.dtype.scalar != tl.float32:
                source = plain_cast(self, source, tl.float32)
            return TensorHandle(bf16_bits(source.data), tl.bfloat16)
        return otherwise()

    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        return convert(self, source, target, lambda: plain_cast(self, source, target))

    def float_to_float(
        self: InterpreterBuilder, source: TensorHandle, target: Any, rounding_mode: Any
    ) -> TensorHandle:
        return convert(
            self, source, target, lambda: plain_float_to_float(self, source, target, rounding_mode)
        )

    def binary(
        self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        result = plain_binary(self, widen(left), widen(right), op)
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(bf16_bits(result.data), tl.bfloat16) if is_bf16(left) else result

    def dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any
    ) -> TensorHandle:
        return plain_dot(self, widen(a), widen(b), d, *rest)

    def constant(self: InterpreterBuilder, value: float) -> TensorHandle:
        return TensorHandle(bf16_bits(np.array([value])), tl.bfloat16)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        scope = plain_patch(function)
        if not patched:
            # The launch's: the scopes of calls inside it are dropped.
            plain_restore = scope.restore

            def restore() -> None:
                patched.clear()
                plain_restore()

            scope.restore = restore
        patched.add(module)
        return scope

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = float_to_float
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.get_bf16 = constant
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch
