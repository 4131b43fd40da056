"""Multi-head attention on the fused kernel."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import BlockMask, attention, decode_attention

from ._masks import Visibility, append_visible_keys, convert_masks, padded_keys

_NAME = "MultiheadAttention"


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on the fused kernel: same constructor, same parameters.

    Equal to ``torch.nn``'s but for rows with nothing to attend to, which give a weight of 0 and
    not NaN, and for NaN behind a key-padding mask or a length, which reaches no output. Beyond
    it: lengths, causality without a mask, and the three parts of ``forward`` as methods
    (``project_query``, ``project_key_value``, ``attend``), from which a key-value cache is
    built.

    Args:
        embed_dim: E, a multiple of ``num_heads``.
        num_heads: H.
        dropout: Probability that an attention weight is dropped in training, in [0, 1).
        bias: Add a bias in the projections.
        add_bias_kv: Append a learned key and value to every sequence.
        add_zero_attn: Append a key and value of zeros to every sequence.
        kdim: Width of ``key``. Default ``embed_dim``.
        vdim: Width of ``value``. Default ``embed_dim``.
        batch_first: Sequences are ``[B, T, E]``, and not ``[T, B, E]``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: A number is out of range.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                f"{_NAME}: embed_dim and num_heads must be positive, got {embed_dim} and "
                f"{num_heads}"
            )
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"{_NAME}: embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{_NAME}: dropout must be in [0, 1), got {dropout}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_lengths: Tensor | None = None,
        key_lengths: Tensor | None = None,
        block_mask: BlockMask | None = None,
        alibi_slopes: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        align: Literal["upper_left", "lower_right"] = "upper_left",
        softcap: float | None = None,
        output_bias: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from each query to the keys.

        Args:
            query: ``[B, T, E]`` with ``batch_first``, else ``[T, B, E]``; unbatched ``[T, E]``.
            key: ``[B, S, kdim]``, ``[S, B, kdim]`` or ``[S, kdim]``.
            value: ``[B, S, vdim]``, ``[S, B, vdim]`` or ``[S, vdim]``.
            key_padding_mask: ``[B, S]``, unbatched ``[S]``; True is ignored, a float is added to
                the logits.
            need_weights: Return the weights as well, in a second pass that takes T x S memory.
            attn_mask: ``[T, S]`` or ``[B * H, T, S]``; True is ignored, a float is added to the
                logits.
            average_attn_weights: Average the weights over the heads.
            is_causal: Query t attends to keys 0..t. Where ``attn_mask`` is given it must be that
                mask, and is not read unless it requires a gradient; it need not be given.
            query_lengths: ``[B]`` int32 or int64: queries at and behind their length attend to
                nothing, and cost nothing.
            key_lengths: ``[B]`` int32 or int64: keys at and behind their length are ignored, and
                cost nothing.
            block_mask: Tiles of a mask, made once for many layers; its empty ones cost nothing.
            alibi_slopes: ``[H]`` or ``[B, H]`` fp32: each logit loses its slope times the distance
                from the diagonal.
            window: ``(left, right)``: how far from the diagonal a query sees; None: no limit.
            align: Whether the diagonal of causality, ALiBi and window begins in the upper left
                corner or ends in the lower right one.
            softcap: Bounds the logits smoothly to (-softcap, softcap).
            output_bias: Add the output projection's bias; else that is left to the caller, who
                has a kernel that adds it for nothing.

        Returns:
            The output, shaped as ``query``, and the weights or None: ``[B, T, S]`` averaged,
            else ``[B, H, T, S]``; without B where unbatched. The weights are those before
            dropout.

        Raises:
            TypeError: A mask is neither bool nor floating point.
            ValueError: Shapes disagree.
        """
        is_batched = self._check(query, key, value)
        batch = 0 if self.batch_first else 1
        if not is_batched:
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            if query is key and key is value:
                query = key = value = query.unsqueeze(batch)
            elif key is value:
                query, key = query.unsqueeze(batch), key.unsqueeze(batch)
                value = key
            else:
                query, key, value = (x.unsqueeze(batch) for x in (query, key, value))
        q, k, v = self.project(query, key, value)
        B, H, T, _ = q.shape
        S = k.size(2)
        visibility = convert_masks(
            _NAME,
            (B, H, T, S),
            attn_mask,
            key_padding_mask,
            query_lengths,
            key_lengths,
            is_causal,
        )._replace(
            block_mask=block_mask,
            alibi_slopes=alibi_slopes,
            window=window,
            align=align,
            softcap=softcap,
        )
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra > 0:
            visibility = append_visible_keys(visibility, T, S, extra, q.device)
        if visibility.mask is not None and visibility.mask.size(-2) > 1:
            merged_lengths = key_lengths if extra > 0 else None
            k, v = _clear_padded_keys(k, v, key_padding_mask, merged_lengths)
        if extra > 0:
            k, v = self._append_keys(k, v)
        if not need_weights:
            output = self._attend(q, k, v, visibility, output_bias)
            return output if is_batched else output.squeeze(batch), None
        context, weights = self._attention(
            q, k, v, visibility, return_weights="mean" if average_attn_weights else True
        )
        output = self._merge(context, output_bias)
        if is_batched:
            return output, weights
        return output.squeeze(batch), weights.squeeze(0)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``project_query`` and ``project_key_value`` in one product where the inputs are one.

        Args:
            query: ``[B, T, E]``, or ``[T, B, E]`` without ``batch_first``; likewise the others.
            key: ``[B, S, kdim]``.
            value: ``[B, S, vdim]``.

        Returns:
            ``[B, H, T, D]``, ``[B, H, S, D]`` and ``[B, H, S, D]``, views without a copy.
        """
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = self._split(F.linear(query, self.in_proj_weight, self.in_proj_bias), 3)
            return q, k, v
        return self.project_query(query), *self.project_key_value(key, value)

    def project_query(self, query: Tensor) -> Tensor:
        """Queries of all heads.

        Args:
            query: ``[B, T, E]``, or ``[T, B, E]`` without ``batch_first``.

        Returns:
            ``[B, H, T, D]``, a view without a copy.
        """
        weight = self.q_proj_weight
        if weight is None:
            weight = self.in_proj_weight[: self.embed_dim]
        return self._split(F.linear(query, weight, self._bias(0, 1)), 1)[0]

    def project_key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads: what a cache holds.

        Args:
            key: ``[B, S, kdim]``, or ``[S, B, kdim]`` without ``batch_first``.
            value: ``[B, S, vdim]`` or ``[S, B, vdim]``. One product does both where it is
                ``key`` itself.

        Returns:
            ``[B, H, S, D]`` twice, views without a copy.
        """
        E = self.embed_dim
        if self.in_proj_weight is not None:
            if key is value:
                packed = F.linear(key, self.in_proj_weight[E:], self._bias(1, 3))
                k, v = self._split(packed, 2)
                return k, v
            key_weight, value_weight = self.in_proj_weight[E : 2 * E], self.in_proj_weight[2 * E :]
        else:
            key_weight, value_weight = self.k_proj_weight, self.v_proj_weight
        k = self._split(F.linear(key, key_weight, self._bias(1, 2)), 1)[0]
        v = self._split(F.linear(value, value_weight, self._bias(2, 3)), 1)[0]
        return k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        query_lengths: Tensor | None = None,
        key_lengths: Tensor | None = None,
        is_causal: bool = False,
        block_mask: BlockMask | None = None,
        alibi_slopes: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        align: Literal["upper_left", "lower_right"] = "upper_left",
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of projected queries, merge of the heads and output projection.

        The arguments are those of ``fused_attn.ops.attention``: True in ``mask`` takes part.
        Weights are dropped out in training. ``add_bias_kv`` and ``add_zero_attn`` have no part
        in it: ``forward`` appends their keys.

        Args:
            q: ``[B, H, T, D]``.
            k: ``[B, H, S, D]``.
            v: ``[B, H, S, D]``.
            mask: bool, broadcastable to ``[B, H, T, S]``.
            bias: Broadcastable to ``[B, H, T, S]``.
            query_lengths: ``[B]``.
            key_lengths: ``[B]``.
            is_causal: Query t attends to keys 0..t.
            block_mask: Tiles of a mask.
            alibi_slopes: ``[H]`` or ``[B, H]``.
            window: ``(left, right)``.
            align: Of the diagonal.
            softcap: Of the logits.

        Returns:
            ``[B, T, E]``, or ``[T, B, E]`` without ``batch_first``.
        """
        visibility = Visibility(
            mask,
            bias,
            query_lengths,
            key_lengths,
            is_causal,
            block_mask,
            alibi_slopes,
            window,
            align,
            softcap,
        )
        return self._attend(q, k, v, visibility)

    def attend_to_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_lengths: Tensor | None = None,
        ancestry: Tensor | None = None,
        is_causal: bool = True,
        return_lse: bool = False,
    ) -> Any:
        """``attend`` for a step of generation: few queries, no gradient, no dropout.

        The arguments are those of ``fused_attn.ops.decode_attention``.

        Args:
            q: ``[R, H, T, D]``.
            k: ``[C, H, S, D]``; C divides R, and rows of queries after one another share a row.
            v: ``[C, H, S, D]``.
            key_lengths: ``[R]`` or ``[C]``.
            ancestry: ``[B, K, S]``: where each of K beams reads each position, R = C = B * K.
            is_causal: The queries are the last T of their keys.
            return_lse: Return the log-sum-exp of each query's logits as well.

        Returns:
            ``[R, T, E]``, or ``[T, R, E]`` without ``batch_first``; with ``return_lse`` also
            ``[R, H, T]`` fp32.
        """
        context, lse = decode_attention(
            q,
            k,
            v,
            key_lengths=key_lengths,
            ancestry=ancestry,
            is_causal=is_causal,
            return_lse=True,
        )
        output = self._merge(context)
        return (output, lse) if return_lse else output

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, output_bias: bool = True
    ) -> Tensor:
        """Output in the module's layout."""
        context = self._attention(q, k, v, visibility, return_weights=False)
        return self._merge(context, output_bias)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        return_weights: bool | Literal["mean"],
    ) -> Any:
        """``attention`` with the module's dropout."""
        bias = visibility.bias
        if bias is not None and bias.dtype not in (q.dtype, torch.float32):
            visibility = visibility._replace(bias=bias.to(q.dtype))
        return attention(
            q,
            k,
            v,
            **visibility._asdict(),
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )

    def _merge(self, context: Tensor, output_bias: bool = True) -> Tensor:
        """Heads ``[B, H, T, D]`` to the output in the module's layout."""
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        merged = context.permute(order).flatten(2)
        return self.out_proj(merged) if output_bias else F.linear(merged, self.out_proj.weight)

    def _split(self, packed: Tensor, count: int) -> tuple[Tensor, ...]:
        """``[B, T, count * E]`` in the module's layout into ``count`` views ``[B, H, T, D]``."""
        heads = packed.unflatten(-1, (count, self.num_heads, self.head_dim))
        order = (2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)
        return heads.permute(order).unbind(0)

    def _bias(self, start: int, stop: int) -> Tensor | None:
        """Biases of the projections ``start`` to ``stop`` in the order query, key, value."""
        if self.in_proj_bias is None:
            return None
        return self.in_proj_bias[start * self.embed_dim : stop * self.embed_dim]

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, S + 1 or 2, D]`` with the learned pair and the pair of zeros."""
        B, H, _, D = k.shape
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k.dtype).view(1, H, 1, D).expand(B, H, 1, D))
            values.append(self.bias_v.to(v.dtype).view(1, H, 1, D).expand(B, H, 1, D))
        if self.add_zero_attn:
            keys.append(k.new_zeros(B, H, 1, D))
            values.append(v.new_zeros(B, H, 1, D))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Raise unless the shapes agree; whether the inputs are batched."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                f"{_NAME}: query, key and value must be dense, got a nested tensor; pad it and "
                f"give lengths or a key_padding_mask"
            )
        T, S = ("[B, T, ", "[B, S, ") if self.batch_first else ("[T, B, ", "[S, B, ")
        if query.dim() not in (2, 3) or query.size(-1) != self.embed_dim:
            raise ValueError(
                f"{_NAME}: query must have shape {T}E] or [T, E] with E = {self.embed_dim}, got "
                f"{list(query.shape)}"
            )
        is_batched = query.dim() == 3
        for name, tensor, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            layout = f"{S}{name[0]}dim]" if is_batched else f"[S, {name[0]}dim]"
            if tensor.dim() != query.dim() or tensor.size(-1) != width:
                raise ValueError(
                    f"{_NAME}: {name} must have shape {layout} with {name[0]}dim = {width}, got "
                    f"{list(tensor.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{_NAME}: value must have the batch and length of key, {list(key.shape[:-1])}, "
                f"got {list(value.shape[:-1])}"
            )
        batch = 0 if self.batch_first else 1
        if is_batched and key.size(batch) != query.size(batch):
            raise ValueError(
                f"{_NAME}: key must have the batch size of query, {query.size(batch)}, got "
                f"{key.size(batch)}"
            )
        return is_batched


def _clear_padded_keys(
    k: Tensor, v: Tensor, key_padding_mask: Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Zero keys and values that are padding.

    The op keeps a NaN out of the result where a mask hides it from all queries alike, and cannot
    see that in a mask that padding was merged into.
    """
    if key_padding_mask is None and key_lengths is None:
        return k, v
    hidden = padded_keys(k.size(2), key_padding_mask, key_lengths)[:, None, :, None]
    return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
