"""The normalisations: one call for all, padding that does not count, and in the Transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.nn import (
    LayerNorm,
    MaskedBatchNorm,
    PowerNorm,
    RMSNorm,
    Transformer,
    TransformerEncoderLayer,
    make_norm,
)

from .twins import check_twins, make_twins, share_parameters

B, T, E = 3, 5, 24
NAMES = ("layer_norm", "rms_norm", "power_norm", "batch_norm")
LENGTHS = torch.tensor([5, 1, 3])
PADDING = torch.arange(T) >= LENGTHS[:, None]


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (B, T, E), generator=generator)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# --- the call that all share ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_training", [True, False])
def test_adds_and_normalises_in_one_call(name: str, is_training: bool) -> None:
    x, residual, x_bias = random(0), random(1), random(2, E)
    plain, adding = (randomised(make_norm(name, E)).train(is_training) for _ in range(2))
    expected_sum = residual + (x + x_bias)
    expected = plain(expected_sum)
    output, total = adding(x, residual, x_bias=x_bias, return_sum=True)
    torch.testing.assert_close(total, expected_sum)
    torch.testing.assert_close(output, expected)
    assert isinstance(adding(x, residual), Tensor)


@pytest.mark.parametrize("name", NAMES)
def test_drops_the_branch_and_its_bias_alone(name: str) -> None:
    norm = make_norm(name, 400)
    x, residual = torch.ones(50, 400), torch.full((50, 400), 7.0)
    torch.manual_seed(0)
    _, total = norm(x, residual, x_bias=torch.ones(400), dropout_p=0.25, return_sum=True)
    dropped = total == 7.0
    assert 0.24 < dropped.float().mean() < 0.26
    torch.testing.assert_close(total[~dropped], torch.full_like(total[~dropped], 7.0 + 2.0 / 0.75))


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_and_wider_residuals(name: str) -> None:
    norm = randomised(make_norm(name, E))
    x, residual = random(0).bfloat16(), random(1)
    output, total = norm(x, residual, return_sum=True)
    assert output.dtype == total.dtype == torch.float32
    output, total = norm(x, residual.bfloat16(), return_sum=True)
    assert output.dtype == total.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_keeps_an_fp32_sum_of_low_precision_branches(kind: type[nn.Module]) -> None:
    norm = kind(E)
    x, residual = random(0).bfloat16(), random(1)
    output, total = norm(x, residual, return_sum=True, fp32_sum=True)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float() + residual)
    output, total = norm(x, return_sum=True, fp32_sum=True)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str) -> None:
    norm = randomised(make_norm(name, E)).eval()
    x, residual = random(0), random(1)

    def call(x: Tensor, residual: Tensor) -> Any:
        return norm(x, residual, dropout_p=0.0, return_sum=True, padding=PADDING)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, residual), call(x, residual), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_wrong_shapes(name: str) -> None:
    norm = make_norm(name, E)
    kind = type(norm).__name__
    with pytest.raises(ValueError, match=rf"^{kind}: input must have shape \[\.\.\., 24\], got"):
        norm(random(0, 3, 25))
    with pytest.raises(ValueError, match=rf"^{kind}: residual must have the shape of x, \[3, 5"):
        norm(random(0), random(1, 5, E))


@pytest.mark.parametrize("kind", [MaskedBatchNorm, PowerNorm])
def test_refuses_wrong_padding(kind: type[nn.Module]) -> None:
    message = rf"^{kind.__name__}: padding must have the rows of x, \[3, 5\], got \[5, 3\]"
    with pytest.raises(ValueError, match=message):
        kind(E)(random(0), padding=PADDING.T)
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: padding must have dtype bool, got fl"):
        kind(E)(random(0), padding=PADDING.float())


def test_refuses_unknown_norms() -> None:
    with pytest.raises(ValueError, match=r"^make_norm: norm must be 'layer_norm', .* got 'group'"):
        make_norm("group", E)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^TransformerEncoderLayer: norm must be 'layer_norm', "):
        TransformerEncoderLayer(E, 2, norm="group")  # type: ignore[arg-type]


# --- RMSNorm --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"eps": 0.1}, {"elementwise_affine": False}, {"normalized_shape": (T, E)}],
    ids=str,
)
def test_rms_norm_equals_torchs(arguments: dict[str, Any]) -> None:
    theirs, ours = make_twins("RMSNorm", **({"normalized_shape": E} | arguments))
    check_twins(theirs, ours, {"x": 3.0 + random(0)}, lambda m, inputs: (m(inputs["x"]),))


def test_rms_norm_of_tiny_values_has_torchs_epsilon() -> None:
    theirs, ours = make_twins("RMSNorm", E)
    for dtype in (torch.float32, torch.bfloat16):
        x = (1e-4 * random(0)).to(dtype)
        torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x))


# --- MaskedBatchNorm ------------------------------------------------------------------------------

BATCH_NORMS = [
    {},
    {"eps": 0.1, "momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
]


@pytest.mark.parametrize("arguments", BATCH_NORMS, ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_batch_norm_equals_torchs_of_what_is_no_padding(
    arguments: dict[str, Any], is_padded: bool
) -> None:
    theirs, ours = nn.BatchNorm1d(E, **arguments), MaskedBatchNorm(E, **arguments)
    share_parameters(theirs, ours)
    padding = PADDING if is_padded else torch.zeros_like(PADDING)
    garbage = torch.where(padding[..., None], torch.nan, 0.0)

    def call(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        x = inputs["x"] + 2.0
        if isinstance(module, MaskedBatchNorm):
            return (module(x + garbage, padding=padding if is_padded else None)[~padding],)
        return (module(x[~padding]),)

    for _ in range(3):
        check_twins(theirs, ours, {"x": 3.0 * random(0)}, call)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
    theirs.eval()
    ours.eval()
    check_twins(theirs, ours, {"x": random(1)}, call)


def test_a_batch_of_padding_leaves_the_statistics_alone() -> None:
    for norm in (randomised(MaskedBatchNorm(E)), randomised(PowerNorm(E))):
        norm(random(0))
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        output = norm(random(1), padding=torch.ones_like(PADDING))
        assert torch.isfinite(output).all()
        output.sum().backward()
        for name, buffer in norm.named_buffers():
            if name != "num_batches_tracked":
                assert torch.equal(buffer, before[name]), name


# --- PowerNorm ------------------------------------------------------------------------------------


class Algorithm2:
    """PowerNorm after the paper, in fp64, position by position."""

    def __init__(self, norm: PowerNorm) -> None:
        self.norm = norm
        self.square = torch.ones(E, dtype=torch.float64)
        self.nu = torch.zeros(E, dtype=torch.float64)
        self.step = 0

    def __call__(self, positions: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Outputs, gradients of positions, weight and bias; updates the statistics."""
        norm, eps = self.norm, self.norm.eps
        x, grad = positions.double(), grad.double()
        weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
        size = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        scaled = x / size
        batch = scaled.square().mean(0)
        self.step += 1
        psi = ((batch if self.step <= norm.warmup_steps else self.square) + eps).sqrt()
        y = scaled / psi
        if self.step <= norm.warmup_steps:
            self.square = self.square + (batch - self.square) / self.step
        else:
            self.square = self.square + (1.0 - norm.alpha_forward) * (batch - self.square)
        g = grad * weight
        corrected = g - self.nu * y
        self.nu = self.nu + (1.0 - norm.alpha_backward) * (y * corrected).mean(0)
        grad_scaled = corrected / psi
        # Of the division by the root mean square, by autograd.
        leaf = x.clone().requires_grad_()
        again = leaf / (leaf.square().mean(-1, keepdim=True) + eps).sqrt()
        (grad_x,) = torch.autograd.grad(again, leaf, grad_scaled)
        return y * weight + bias, grad_x, (grad * y).sum(0), grad.sum(0)


@pytest.mark.parametrize("is_padded", [False, True])
def test_power_norm_follows_the_paper(is_padded: bool) -> None:
    norm = PowerNorm(E, alpha_forward=0.8, alpha_backward=0.7, warmup_steps=2)
    randomised(norm)
    paper = Algorithm2(norm)
    padding = PADDING if is_padded else torch.zeros_like(PADDING)
    for step in range(5):
        x = (1.0 + step) * random(step)
        grad = random(100 + step)
        garbage = torch.where(padding[..., None], torch.nan, x).requires_grad_()
        output = norm(garbage, padding=padding if is_padded else None)
        expected = paper(x[~padding], grad[~padding])
        wanted = (garbage, norm.weight, norm.bias)
        cleared = grad.masked_fill(padding[..., None], 0.0)
        grad_x, *others = torch.autograd.grad(output, wanted, cleared)
        assert bool((grad_x[padding] == 0.0).all())
        actual = (output[~padding], grad_x[~padding], *others)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_square.double(), paper.square, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_gradient.double(), paper.nu, rtol=1e-4, atol=1e-6)

    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    x = random(9)
    scaled = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    expected = scaled / (norm.running_square + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm.eval()(x), expected)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name
    again = PowerNorm(E, warmup_steps=2).eval()
    again.load_state_dict(norm.state_dict())
    assert torch.equal(again(x), norm(x))


def test_power_norm_refuses_an_alpha_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^PowerNorm: alpha_forward must be in \[0, 1\), got 1.0"):
        PowerNorm(E, alpha_forward=1.0)
    with pytest.raises(ValueError, match=r"^PowerNorm: alpha_backward must be in \[0, 1\), got -1"):
        PowerNorm(E, alpha_backward=-1.0)
    text = repr(PowerNorm(E, warmup_steps=7))
    assert text == (
        "PowerNorm(24, eps=1e-05, alpha_forward=0.9, alpha_backward=0.9, warmup_steps=7)"
    )


# --- in the Transformer ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NAMES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded_by", ["lengths", "mask"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_does_not_count_in_training(
    norm: Any, norm_first: bool, padded_by: str, batch_first: bool
) -> None:
    """Other values behind the lengths change neither a valid output nor a gradient nor a buffer."""
    results = []
    for value in (0.0, 50.0):
        torch.manual_seed(0)
        module = Transformer(
            E, 2, 1, 1, 32, 0.0, batch_first=batch_first, norm_first=norm_first, norm=norm
        )
        src = random(1).masked_fill(PADDING[..., None], value)
        tgt = random(2).masked_fill(PADDING[..., None], value)
        if not batch_first:
            src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
        if padded_by == "lengths":
            masks: dict[str, Tensor] = {"src_lengths": LENGTHS, "tgt_lengths": LENGTHS}
        else:
            masks = dict.fromkeys(
                ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"), PADDING
            )
        output = module(src, tgt, tgt_is_causal=True, **masks)
        valid = output[~PADDING if batch_first else ~PADDING.T]
        gradients = torch.autograd.grad(valid.square().sum(), list(module.parameters()))
        results.append((valid, *gradients, *module.buffers()))
    for ours, others in zip(*results, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-4)


def test_unbatched_sequences_have_padding_too() -> None:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(E, 2, 32, 0.0, norm="batch_norm")
    x, padding = random(0)[0], torch.tensor([False, False, False, True, True])
    short = layer(x[:3])
    buffers = [buffer.clone() for buffer in layer.buffers()]
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(E, 2, 32, 0.0, norm="batch_norm")
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding)[:3], short)
    for buffer, expected in zip(layer.buffers(), buffers, strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_takes_any_module_as_a_norm(norm_first: bool) -> None:
    """A module that knows nothing of residuals is called with the sum."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    ours = TransformerEncoderLayer(E, 2, 32, **options)
    other = TransformerEncoderLayer(E, 2, 32, **options, norm=nn.LayerNorm)
    assert type(other.norm1) is nn.LayerNorm
    share_parameters(ours, other)
    torch.testing.assert_close(other(random(0)), ours(random(0)))
