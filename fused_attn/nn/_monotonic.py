"""Monotonic alignments: expected ones to train with, hard ones to decode with.

Source positions are looked at from left to right, beginning where the last step stopped; position j
is chosen with probability p_ij = sigmoid(energy_ij), else passed over. With q_ij the probability
that step i gets as far as j,

    q_ij = (1 - p_i,j-1) q_i,j-1 + alpha_i-1,j        alpha_ij = p_ij q_ij

A step that has passed the end looks at nothing, and so does every later one: alpha_i sums to at
most 1.

The closed form with cumulative products divides by a product of (1 - p), which underflows. Here
nothing is divided and nothing subtracted: every term is a product or a sum of numbers in [0, 1],
so the relative error stays at a few roundings for each position.

Reference: Raffel et al., 2017. https://arxiv.org/abs/1704.00784
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def expected_alignments(energy: Tensor, previous: Tensor) -> Tensor:
    """The alignments' expectation, differentiable.

    Args:
        energy: ``[..., T, S]``, fp32 or fp64; -inf: never chosen.
        previous: ``[..., S]``: the alignment of the step before the first.

    Returns:
        ``[..., T, S]``.
    """
    choose, skip = torch.sigmoid(energy), torch.sigmoid(-energy)
    if energy.numel() == 0:
        return choose
    if energy.size(-2) == 1:
        return choose * _reached(skip, previous.unsqueeze(-2))
    apply = _ExpectedAlignments.apply
    if torch.compiler.is_compiling():
        # A break in the graph: unrolled, the rounds would be compiled anew for each T and S.
        apply = torch.compiler.disable(apply)
    return apply(choose, skip, previous)


def hard_alignments(energy: Tensor, previous: Tensor) -> Tensor:
    """Each step chooses the first position with p >= 0.5, from where the last one stopped.

    What the recursion gives for p in {0, 1}.

    Args:
        energy: ``[..., T, S]``; -inf: never chosen.
        previous: ``[..., S]``: 1 where the last step stopped, else 0; all 0 where it had passed the
            end.

    Returns:
        ``[..., T, S]`` of ``previous.dtype``: 1 where a step stops, else 0. No gradient.
    """
    S = energy.size(-1)
    if S == 0:
        return torch.zeros_like(energy, dtype=previous.dtype)
    places = torch.arange(S, device=energy.device)
    chosen = torch.where(energy >= 0, places, S)  # [..., T, S]
    place = torch.where(previous > 0, places, S).amin(-1, keepdim=True)  # [..., 1]
    found = []
    for row in chosen.unbind(-2):
        place = row.masked_fill(places < place, S).amin(-1, keepdim=True)
        found.append(place)
    stacked = torch.stack(found, dim=-2) if found else chosen[..., :1]
    return (stacked == places).to(previous.dtype)


def _reached(skip: Tensor, arrived: Tensor) -> Tensor:
    """``q_j = skip_j-1 q_j-1 + arrived_j`` along the last dimension, in log2(S) rounds.

    After a round of distance d, ``q_j`` has what arrived at the 2 d positions up to j, and
    ``passed_j`` is the probability of passing from j - 2 d to j.
    """
    S = skip.size(-1)
    passed = F.pad(skip, (1, -1))
    q = arrived
    distance = 1
    while distance < S:
        shift = (distance, -distance)
        q = q + passed * F.pad(q, shift)
        passed = passed * F.pad(passed, shift)
        distance *= 2
    return q


class _ExpectedAlignments(torch.autograd.Function):
    """The recursion for all T steps, along antidiagonals d = i + j: T + S - 1 rounds, not T S.

    Round d needs round d - 1 alone: ``q_i,j-1`` from the same step, ``alpha_i-1,j`` from the one
    before. Diagonals are rows ``[T, N]`` of buffers; what lies outside of the source is 0.
    """

    @staticmethod
    def forward(ctx: Any, choose: Tensor, skip: Tensor, previous: Tensor) -> Tensor:
        *batch, T, S = choose.shape
        p, r = _skewed(choose), _skewed(skip)  # [T + S, T, N]
        q = torch.zeros_like(p)
        # Row i + 1 of a diagonal is step i's; row 0 what came before the first, so that the rows
        # 0..T - 1 of diagonal d are what flows into diagonal d + 1.
        alpha = p.new_zeros(T + S, T + 1, p.size(2))
        before = previous.reshape(-1, S).T  # [S, N]
        alpha[: S - 1, 0] = before[1:]
        q[0, 0] = before[0]
        torch.mul(p[0], q[0], out=alpha[0, 1:])
        for d in range(1, T + S - 1):
            torch.addcmul(alpha[d - 1, :T], r[d - 1], q[d - 1], out=q[d])
            torch.mul(p[d], q[d], out=alpha[d, 1:])
        ctx.save_for_backward(p, r, q)
        ctx.batch = batch
        return _straight(alpha[:, 1:], batch, S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, r, q = ctx.saved_tensors
        T = p.size(1)
        S = p.size(0) - T
        grad_alpha = _skewed(grad_alpha)
        # Row T stays 0: the last step's alignment flows nowhere.
        grad_q = p.new_zeros(T + S, T + 1, p.size(2))
        for d in range(T + S - 2, -1, -1):
            grad_alpha[d] += grad_q[d + 1, 1:]
            torch.mul(p[d], grad_alpha[d], out=grad_q[d, :T])
            grad_q[d, :T].addcmul_(r[d], grad_q[d + 1, :T])
        grad_choose = _straight(grad_alpha * q, ctx.batch, S)
        grad_skip = _straight(grad_q[1:, :T] * q[:-1], ctx.batch, S)
        grad_previous = grad_q[:S, 0].T.reshape(*ctx.batch, S)
        return grad_choose, grad_skip, grad_previous


def _skewed(tensor: Tensor) -> Tensor:
    """``[..., T, S]`` to ``[T + S, T, N]``: ``tensor[..., i, d - i]`` at ``[d, i]``, else 0."""
    T, S = tensor.shape[-2:]
    flat = tensor.reshape(-1, T, S).permute(1, 2, 0)
    diagonals = tensor.new_zeros(T + S, T, flat.size(2))
    _positions(diagonals, S).copy_(flat)
    return diagonals


def _straight(diagonals: Tensor, batch: list[int], S: int) -> Tensor:
    """Back to ``[..., T, S]``."""
    positions = _positions(diagonals, S)
    return positions.permute(2, 0, 1).reshape(*batch, positions.size(0), S)


def _positions(diagonals: Tensor, S: int) -> Tensor:
    """A view ``[T, S, N]`` of diagonals ``[T + S - 1 or more, T, N]``."""
    _, T, N = diagonals.shape
    round_stride, step_stride, batch_stride = diagonals.stride()
    strides = (round_stride + step_stride, round_stride, batch_stride)
    return diagonals.as_strided((T, S, N), strides)
