"""What docs/attention.md says of PyTorch's own attentions, where a CPU can show it.

If one of these fails, a new PyTorch has changed: change the table.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fused_attn import attention

pytestmark = [
    pytest.mark.skipif(
        torch.__version__ < "2.13", reason="docs/attention.md speaks of torch 2.13 and later"
    ),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def inputs(keys: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 1, 4, 8), torch.randn(1, 1, keys, 8)


def test_rows_that_see_nothing() -> None:
    query, key = inputs()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    assert not attention(query, key, key, mask=mask)[0, 0, 1].any()
    assert not F.scaled_dot_product_attention(query, key, key, mask)[0, 0, 1].any()
    blocks = create_block_mask(lambda b, h, t, s: t != 1, 1, 1, 4, 6, device="cpu")
    assert not flex_attention(query, key, key, block_mask=blocks)[0, 0, 1].any()


def test_nan_behind_a_mask_of_keys() -> None:
    query, key = inputs()
    key[:, :, 4:] = torch.nan
    mask = (torch.arange(6) < 4).expand(4, 6)
    assert attention(query, key, key, mask=mask[:1]).isfinite().all()
    assert F.scaled_dot_product_attention(query, key, key, mask).isnan().all()
    blocks = create_block_mask(lambda b, h, t, s: s < 4, 1, 1, 4, 6, device="cpu")
    assert flex_attention(query, key, key, block_mask=blocks).isnan().all()


def test_causality_is_aligned_to_the_upper_left() -> None:
    query, key = inputs()
    theirs = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    torch.testing.assert_close(attention(query, key, key, is_causal=True), theirs)
    torch.testing.assert_close(theirs[0, 0, 0], key[0, 0, 0])


def test_the_gradient_of_a_bias() -> None:
    query, key = inputs()
    found = []
    for function in (
        lambda bias: attention(query, key, key, bias=bias),
        lambda bias: F.scaled_dot_product_attention(query, key, key, bias),
    ):
        bias = torch.zeros(4, 6, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(bias).square().sum(), bias)
        found.append(gradient)
    torch.testing.assert_close(*found)


def test_flex_attention_does_not_train_on_a_cpu() -> None:
    query, key = inputs()
    query.requires_grad_()
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(query, key, key)
    attention(query, key, key).sum().backward()
    assert query.grad is not None
