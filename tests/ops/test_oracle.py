"""The oracle of a call that is too large for it: a part, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_attn.ops.attention import cases
from fused_attn.ops.attention.cases import AttentionCase
from fused_attn.validation import case_inputs, compare_results, oracle_and_reference, run_case

CASE = AttentionCase(
    name="part",
    kind="typical",
    B=3,
    H=2,
    T=9,
    S=11,
    D=4,
    is_causal=True,
    query_lengths=(9, 9, 7),
    key_lengths=(11, 4, 8),
    mask_shape=(9, 11),
)


def test_a_part_has_the_results_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case_inputs(CASE, torch.float32, "cpu")
    assert CASE.part(inputs) is None
    whole = oracle_and_reference(CASE, inputs)
    monkeypatch.setattr(cases, "_LARGEST_REFERENCE", 0)
    part = oracle_and_reference(CASE, inputs)
    for of_whole, of_part in zip(whole, part, strict=True):
        assert of_part.keys() == of_whole.keys()
        for name, tensor in of_part.items():
            torch.testing.assert_close(tensor, of_whole[name][-1:, -1:], msg=name)
    assert part[0]["grad_key"].abs().max() > 0.0


def test_only_the_part_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_LARGEST_REFERENCE", 0)
    inputs = case_inputs(CASE, torch.float32, "cpu")
    expected = oracle_and_reference(CASE, inputs)

    def passed(actual: dict[str, Tensor]) -> bool:
        return all(c.passed for c in compare_results(CASE, inputs, actual, *expected))

    actual = run_case(CASE, inputs, None)
    assert passed(actual)
    actual["grad_query"][0] += 1.0
    assert passed(actual)
    actual["grad_query"][-1, -1, 3, 1] += 1e-3
    assert not passed(actual)


@pytest.mark.parametrize(
    "flags",
    [{"bias_shape": (9, 11)}, {"key_heads": 1}, {"alibi": True}, {"mask_shape": (2, 9, 11)}],
)
def test_what_has_no_independent_part_is_refused(
    flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AttentionCase(name="b", kind="typical", B=1, H=2, T=9, S=11, D=4, **flags)  # type: ignore[arg-type]
    monkeypatch.setattr(cases, "_LARGEST_REFERENCE", 0)
    with pytest.raises(NotImplementedError, match="b: too large for the reference"):
        case.part(case_inputs(case, torch.float32, "cpu"))
