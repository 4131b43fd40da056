"""The attention of recurrent decoders: additive, multiplicative, location-aware, monotonic."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import additive_attention, additive_scores

from ._attention_checks import Kind, check_memory, check_options, check_query, check_state
from ._attention_products import products, softmax, weighted, weights_dtype
from ._attention_state import AttentionMemory, AttentionState
from ._monotonic import expected_alignments, hard_alignments

_NAME = "RecurrentAttention"


class RecurrentAttention(nn.Module):
    """Attention from a recurrent decoder's states to a source.

    With q a query, k a state of the source, and all products without a bias but where one is
    named, the score is, by ``kind``,

        additive      v^T tanh(W_q q + b + W_k k)                    Bahdanau et al., 2014
        location      v^T tanh(W_q q + b + W_k k + W_f f)            Chorowski et al., 2015
        dot           q^T k                                          Luong et al., 2015
        general       q^T W k                                        Luong et al., 2015
        scaled_dot    (W_q q)^T (W_k k) / sqrt(E / H)                Vaswani et al., 2017

    where f are ``location_filters`` convolutions over the weights of the step before. Before the
    first step these are uniform over the source's length (as in ESPnet). The weights are the
    softmax of the scores over the source; of a source of length 0 they are 0, as is the context.

    With ``coverage`` the sum of the weights of all steps before is one feature more of f (See et
    al., 2017); before the first step it is 0.

    With H heads each has its own scores, weights, filters and coverage, over a slice of the
    projections (in ``dot`` of query and source themselves, in ``general`` a W of its own); the
    context is then that of a projection of the source, split over the heads, and projected back.

    With ``monotonic`` there is no softmax: positions are looked at from left to right, and chosen
    with probability sigmoid(score + r), r learned; each step goes on where the last one stopped
    (Raffel et al., 2017). v becomes g v / |v|. In training the weights are expectations, with
    normal noise of standard deviation ``monotonic_noise`` before the sigmoid; in evaluation each
    step takes the first position of probability 1/2 or more. A step that finds none has weights and
    context 0, and so have all after it. Before the first step position 0 has the weight. Under
    ``torch.compile`` training breaks the graph where the expectations are made.

    A decoder uses it so; ``step`` is ``forward`` for one step of K targets a source:

        memory = attention.read(encoded, lengths)
        state = attention.initial(memory)
        context, weights, state = attention(queries, memory, state)

    The parameters, whose names stay: ``query_projection``, ``key_projection``, ``score_weight``
    ``[H, E / H]`` (v), ``location_convolution``, ``feature_weight`` ``[H, F, E / H]`` (W_f; the
    coverage is last), ``value_projection`` and ``output_projection`` (where H > 1), ``score_bias``
    ``[H]`` (r) and ``score_gain`` ``[H]`` (g). Matrices begin Xavier-uniform, the bias of the
    queries at 0, g at 1 / sqrt(E / H), r at ``monotonic_bias``.

    Args:
        kind: See above.
        query_size: Q, width of the queries.
        memory_size: M, width of the source's states.
        attention_size: E, a multiple of H. Default M. ``dot`` and ``general`` have no use for it.
        num_heads: H. More than one must divide M.
        location_filters: How many convolutions, of ``location`` alone.
        location_width: Positions that each sees, odd: half of them before, half after.
        coverage: See above; of ``additive`` and ``location``.
        monotonic: See above.
        monotonic_bias: First value of r. The lower, the farther a new model looks; it may need to
            be lower, the longer sources are beside targets.
        monotonic_noise: See above.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: A number is out of range, the kind unknown, or an option not one of the kind.

    Reference: https://arxiv.org/abs/1409.0473, https://arxiv.org/abs/1506.07503,
    https://arxiv.org/abs/1508.04025, https://arxiv.org/abs/1706.03762,
    https://arxiv.org/abs/1704.04368, https://arxiv.org/abs/1704.00784
    """

    def __init__(
        self,
        kind: Kind,
        query_size: int,
        memory_size: int,
        *,
        attention_size: int | None = None,
        num_heads: int = 1,
        location_filters: int = 10,
        location_width: int = 31,
        coverage: bool = False,
        monotonic: bool = False,
        monotonic_bias: float = -1.0,
        monotonic_noise: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        Q, M, H = query_size, memory_size, num_heads
        E = M if attention_size is None else attention_size
        check_options(kind, Q, M, E, H, location_filters, location_width, coverage, monotonic_noise)
        self.kind: Kind = kind
        self.query_size, self.memory_size, self.attention_size = Q, M, E
        self.num_heads = H
        self.coverage = coverage
        self.monotonic = monotonic
        self.monotonic_bias, self.monotonic_noise = monotonic_bias, monotonic_noise
        self.is_additive = kind in ("additive", "location")
        # Fields of the state that this attention has a use for.
        self._kept: tuple[str, ...] = ("previous",) if monotonic or kind == "location" else ()
        if coverage:
            self._kept += ("coverage",)

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias, device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        projected = self.is_additive or kind == "scaled_dot"
        self.query_projection: nn.Linear | None = None
        if kind != "dot":
            self.query_projection = linear(Q, E if projected else H * M, self.is_additive)
        self.key_projection = linear(M, E) if projected else None
        self.location_convolution: nn.Conv1d | None = None
        features = int(coverage)
        if kind == "location":
            features += location_filters
            self.location_convolution = nn.Conv1d(
                H,
                H * location_filters,
                location_width,
                padding=location_width // 2,
                groups=H,
                bias=False,
                device=device,
                dtype=dtype,
            )
        self.score_weight = parameter(H, E // H) if self.is_additive else None
        self.feature_weight = parameter(H, features, E // H) if features > 0 else None
        self.value_projection = linear(M, M) if H > 1 else None
        self.output_projection = linear(M, M) if H > 1 else None
        self.score_bias = parameter(H) if monotonic else None
        self.score_gain = parameter(H) if monotonic and self.is_additive else None
        self.reset_parameters()

    @property
    def context_size(self) -> int:
        """Width of the context: M."""
        return self.memory_size

    @property
    def is_recurrent(self) -> bool:
        """Whether scores depend on the weights of steps before, so that they come one by one."""
        return self.feature_weight is not None

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for name in ("query", "key", "value", "output"):
            projection = getattr(self, f"{name}_projection")
            if projection is None:
                continue
            outputs, inputs = projection.weight.shape
            # In `general` each head has a matrix of its own.
            heads = self.num_heads if self.kind == "general" and name == "query" else 1
            _xavier(projection.weight, inputs, outputs // heads)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.score_weight is not None:
            _xavier(self.score_weight, self.score_weight.size(1), 1)
        if self.feature_weight is not None:
            _xavier(self.feature_weight, *self.feature_weight.shape[1:])
        if self.location_convolution is not None:
            outputs, _, width = self.location_convolution.weight.shape
            _xavier(self.location_convolution.weight, width, outputs // self.num_heads * width)
        if self.score_bias is not None:
            nn.init.constant_(self.score_bias, self.monotonic_bias)
        if self.score_gain is not None:
            nn.init.constant_(self.score_gain, (self.attention_size // self.num_heads) ** -0.5)

    def read(self, memory: Tensor, lengths: Tensor | None = None) -> AttentionMemory:
        """Project the sources, once for all steps.

        Args:
            memory: ``[B, S, M]``.
            lengths: ``[B]`` int32 or int64, 0 allowed; what lies behind reaches no output and no
                gradient, NaN included. Default: S for all.

        Raises:
            TypeError: ``lengths`` are not integers.
            ValueError: Shapes disagree, or a length is out of range, where they are on the CPU.
        """
        check_memory(memory, lengths, self.memory_size)
        if lengths is not None:
            behind = torch.arange(memory.size(1), device=memory.device) >= lengths[:, None]
            memory = memory.masked_fill(behind[:, :, None], 0.0)
            lengths = lengths.clone()
        value = self._heads(memory, self.value_projection)
        if self.key_projection is not None:
            key = self._heads(memory, self.key_projection)
            value = value.to(key.dtype)  # under autocast the memory may be wider
        elif self.kind == "general":
            key = value if self.num_heads == 1 else memory.unsqueeze(1)
        else:
            key = value if self.num_heads == 1 else self._heads(memory, None)
        return AttentionMemory(key, value, lengths)

    def initial(self, memory: AttentionMemory, beam_size: int = 1) -> AttentionState:
        """The state before the first step.

        Args:
            memory: B sources, from ``read``.
            beam_size: K, targets of each source.

        Raises:
            ValueError: K is not positive.
        """
        if beam_size < 1:
            raise ValueError(f"{_NAME}: beam_size must be positive, got {beam_size}")
        value = memory.value
        B, S = value.size(0), value.size(2)
        shape = (B, beam_size, self.num_heads, S)
        dtype = weights_dtype(memory)
        state = AttentionState()
        if "coverage" in self._kept:
            state.coverage = torch.zeros(shape, dtype=dtype, device=value.device)
        if "previous" in self._kept:
            places = torch.arange(S, device=value.device)
            lengths = memory.lengths
            if lengths is None:
                lengths = torch.full((B,), S, device=value.device)
            # How many positions share the weight.
            length = (lengths.clamp(max=1) if self.monotonic else lengths)[:, None]
            weights = (places < length).to(dtype) / length.clamp(min=1)
            state.previous = weights[:, None, None].expand(shape).contiguous()
        return state

    def forward(
        self, query: Tensor, memory: AttentionMemory, state: AttentionState | None = None
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """T steps of one target a source.

        All at once, but where ``is_recurrent`` holds; then one after the other.

        Args:
            query: ``[B, T, Q]``.
            memory: B sources, from ``read``.
            state: From ``initial``, or an earlier call. Default: ``initial``. It is not changed.

        Returns:
            The context ``[B, T, M]``; the weights, the heads' mean, ``[B, T, S]`` in fp32 (fp64 in
            a module of fp64), differentiable; the state after the last step.

        Raises:
            ValueError: Shapes disagree.
        """
        check_query(query, memory, self.query_size)
        if state is None:
            state = self.initial(memory)
        check_state(state, memory, 1, self._kept)
        q = self._project_query(query, memory)
        if q.size(2) == 0:
            return self._empty(memory, state)
        if self.is_recurrent:
            rows = []
            for t in range(q.size(2)):
                row = self._weights(q[:, :, t : t + 1], memory, state)
                state = _after(state, row)
                rows.append(row)
            # The contexts come last: one product, and in the backward one gradient of the values.
            heads = torch.cat(rows, 2)
            return self._merge(weighted(heads, memory.value)), heads.mean(1), state
        if state.previous is None:
            context, heads = self._attend(q, memory, None)
            return self._merge(context), heads.mean(1), state
        heads = self._align(self._energy(q, memory, None), state.previous[:, 0])
        state = AttentionState(heads[:, None, :, -1])
        return self._merge(weighted(heads, memory.value)), heads.mean(1), state

    def step(
        self, query: Tensor, memory: AttentionMemory, state: AttentionState
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """One step of K targets a source, whose keys and values are read once for them.

        Differentiable, as ``forward``, which it equals.

        Args:
            query: ``[B, K, Q]``.
            memory: B sources, from ``read``.
            state: From ``initial`` with ``beam_size`` K, or the last step. It is not changed.

        Returns:
            The context ``[B, K, M]``, the weights ``[B, K, S]`` as in ``forward``, and the state
            after the step.

        Raises:
            ValueError: Shapes disagree.
        """
        check_query(query, memory, self.query_size)
        check_state(state, memory, query.size(1), self._kept)
        q = self._project_query(query, memory)
        if self.monotonic:
            heads = self._weights(q, memory, state)
            context = weighted(heads, memory.value)
        else:
            context, heads = self._attend(q, memory, self._features(state, q.dtype))
        return self._merge(context), heads.mean(1), _after(state, heads)

    def _weights(self, q: Tensor, memory: AttentionMemory, state: AttentionState) -> Tensor:
        """Weights ``[B, H, K, S]`` of one step, where it depends on those before."""
        features = self._features(state, q.dtype)
        if self.monotonic and state.previous is not None:
            energy = self._energy(q, memory, features)[..., None, :]  # [B, H, K, 1, S]
            return self._align(energy, state.previous.transpose(1, 2)).squeeze(-2)
        return softmax(self._scores(q, memory, features), memory.visible())

    def _attend(
        self, q: Tensor, memory: AttentionMemory, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Context ``[B, H, T, D]`` and weights ``[B, H, T, S]`` of a softmax."""
        if self.score_weight is not None:
            return additive_attention(
                q,
                memory.key,
                memory.value,
                self.score_weight,
                features=features,
                feature_weight=self.feature_weight,
                key_lengths=memory.lengths,
            )
        weights = softmax(self._scores(q, memory, features), memory.visible())
        return weighted(weights, memory.value), weights

    def _scores(self, q: Tensor, memory: AttentionMemory, features: Tensor | None) -> Tensor:
        """``[B, H, T, S]``, anything behind the lengths."""
        if self.score_weight is None:
            return products(q, memory.key)
        weight: Tensor = self.score_weight
        if self.score_gain is not None:
            weight = (F.normalize(weight, dim=1) * self.score_gain[:, None]).to(weight.dtype)
        return additive_scores(
            q,
            memory.key,
            weight,
            features=features,
            feature_weight=self.feature_weight,
            key_lengths=memory.lengths,
        )

    def _energy(self, q: Tensor, memory: AttentionMemory, features: Tensor | None) -> Tensor:
        """Logits of choosing a position ``[B, H, T, S]``, -inf behind the lengths."""
        assert self.score_bias is not None
        scores = self._scores(q, memory, features)
        visible = memory.visible()
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None], -math.inf)
        return scores + self.score_bias[:, None, None].to(scores.dtype)

    def _align(self, energy: Tensor, previous: Tensor) -> Tensor:
        """Monotonic alignments ``[..., T, S]`` after ``previous [..., S]``."""
        if not self.training:
            return hard_alignments(energy, previous)
        if self.monotonic_noise > 0.0:
            energy = energy + self.monotonic_noise * torch.randn_like(energy)
        return expected_alignments(energy, previous)

    def _features(self, state: AttentionState, dtype: torch.dtype) -> Tensor | None:
        """What the scores of the next step depend on: ``[B, H, K, S, F]``."""
        parts = []
        if self.location_convolution is not None and state.previous is not None:
            convolution = self.location_convolution
            B, K, H, S = state.previous.shape
            rows = state.previous.reshape(B * K, H, S).to(convolution.weight.dtype)
            # torch refuses to convolve nothing.
            maps = (
                convolution(rows) if S > 0 else rows.new_empty(B * K, convolution.out_channels, 0)
            )
            maps = maps.view(B, K, H, convolution.out_channels // H, S)
            parts.append(maps.permute(0, 2, 1, 4, 3).to(dtype))
        if state.coverage is not None:
            parts.append(state.coverage.transpose(1, 2).unsqueeze(-1).to(dtype))
        if len(parts) < 2:
            return parts[0] if parts else None
        return torch.cat(parts, -1)

    def _project_query(self, query: Tensor, memory: AttentionMemory) -> Tensor:
        """``[B, T, Q]`` to ``[B, H, T, E]``."""
        q = self._heads(query, self.query_projection)
        if self.kind == "scaled_dot":
            q = q * q.size(-1) ** -0.5
        return q.to(memory.key.dtype)

    def _heads(self, x: Tensor, projection: nn.Linear | None) -> Tensor:
        """``[B, T, E]`` to ``[B, H, T, E / H]``, a view."""
        if projection is not None:
            x = projection(x)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge(self, context: Tensor) -> Tensor:
        """``[B, H, T, D]`` to ``[B, T, M]``."""
        merged = context.transpose(1, 2).flatten(2)
        return merged if self.output_projection is None else self.output_projection(merged)

    def _empty(
        self, memory: AttentionMemory, state: AttentionState
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """No steps."""
        B, _, S, _ = memory.value.shape
        weights = memory.value.new_zeros(B, 0, S, dtype=weights_dtype(memory))
        return self._merge(memory.value[:, :, :0]), weights, state


def _after(state: AttentionState, weights: Tensor) -> AttentionState:
    """The state after a step with weights ``[B, H, K, S]``."""
    heads = weights.transpose(1, 2)
    return AttentionState(
        None if state.previous is None else heads,
        None if state.coverage is None else state.coverage + heads,
    )


def _xavier(weight: Tensor, inputs: int, outputs: int) -> None:
    """Draw ``weight`` uniformly, its variance 2 / (inputs + outputs): Glorot and Bengio, 2010."""
    bound = math.sqrt(6.0 / (inputs + outputs))
    nn.init.uniform_(weight, -bound, bound)
