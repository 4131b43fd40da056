"""Linear layers whose bias is added by the kernel that comes next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Product(NamedTuple):
    """What a branch computes, with a bias that is still to be added."""

    product: Tensor
    bias: Tensor | None = None

    def total(self) -> Tensor:
        """The product with its bias."""
        return self.product if self.bias is None else self.product + self.bias


def product_of(linear: nn.Module, x: Tensor) -> Product:
    """``linear(x)``, its bias left to the caller where nobody could notice.

    A module that replaces a linear layer (quantised, adapted, parametrised), or has hooks, is
    called as it is.
    """
    if leaves_bias(linear):
        return Product(F.linear(x, linear.weight), linear.bias)  # type: ignore[arg-type]
    return Product(linear(x))


def leaves_bias(linear: nn.Module) -> bool:
    """Whether the layer can be computed without a call of the module."""
    return is_plain(linear, nn.Linear, NonDynamicallyQuantizableLinear)


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is of just one of these types, and nothing observes or replaces its call."""
    return (
        type(module) in types
        and not any(getattr(module, hooks) for hooks in HOOKS)
        and not any(getattr(torch_module, "_global" + hooks) for hooks in HOOKS)
        and "forward" not in module.__dict__
    )
