"""ONNX Runtime's peers on small cases: the same function, or a refusal with the reason."""

from __future__ import annotations

import pytest
import torch

from benchmarks.checks import require_same_function
from benchmarks.peers import peers_of
from fused_attn.ops._cases import Case
from fused_attn.ops.bias_activation_dropout.cases import BiasActivationDropoutCase
from fused_attn.validation import op_cases

pytest.importorskip("onnxruntime", reason="the extra `peers` is not installed")
pytest.importorskip("onnx", reason="the extra `peers` is not installed")


def check(case: Case, name: str = "onnxruntime") -> None:
    peer = peers_of(case.op, "cpu")[name]
    run = peer.make(case)
    require_same_function(case, peer, run, torch.float32, "cpu", "forward")


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("add_layer_norm", "typical"),
        ("add_layer_norm", "typical_pre_norm"),
        ("add_layer_norm", "typical_rms_norm"),
        ("attention", "encoder_padded"),
        ("attention", "decoder"),
        ("attention", "relative_positions"),
        ("attention", "graph"),
        ("attention", "decoding_step"),
        ("decode_attention", "self_attention"),
        ("decode_attention", "grouped_query"),
        ("decode_attention", "beams_of_a_source"),
    ],
)
def test_computes_the_same(op: str, name: str) -> None:
    (case,) = (case for case in op_cases(op) if case.name == name)
    check(case)


def test_gelu_and_its_approximation() -> None:
    for activation in ("gelu", "gelu_tanh"):
        check(
            BiasActivationDropoutCase(
                name="small", kind="typical", leading=(3, 4), width=24, activation=activation
            )
        )


def test_the_fused_kernel_of_attention_takes_no_mask() -> None:
    from fused_attn.ops.attention.cases import AttentionCase

    sizes = {"kind": "typical", "B": 2, "H": 2, "T": 9, "S": 13, "D": 8}
    check(AttentionCase(name="plain", **sizes, scale=0.7), "onnxruntime_flash")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="takes no mask"):
        check(AttentionCase(name="causal", **sizes, is_causal=True), "onnxruntime_flash")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "name", "reason"),
    [
        ("add_layer_norm", "typical_dropout", "no dropout"),
        ("attention", "packed_encoder", "no packed batches"),
        ("attention", "training_decoder", "no dropout"),
        ("bias_activation_dropout", "typical_swiglu", "bias and GELU alone"),
        ("decode_attention", "beams_with_an_ancestry", "does not reorder a cache"),
    ],
)
def test_refuses_with_the_reason(op: str, name: str, reason: str) -> None:
    (case,) = (case for case in op_cases(op) if case.name == name)
    with pytest.raises(NotImplementedError, match=reason):
        check(case)
