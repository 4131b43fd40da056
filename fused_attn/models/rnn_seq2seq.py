"""The recurrent encoder-decoder."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.nn import packed as layers
from fused_attn.ops import copy_distribution, copy_nll

from .rnn_config import POINTER_VOCABULARY, RNNSeq2SeqConfig
from .rnn_decoder import Beginning, Decoded, RNNDecoder, join
from .rnn_decoding import RNNDecoding, check_looks, spread
from .rnn_encoder import FrontEnd, RNNEncoder
from .rnn_initialization import initialize
from .rnn_output import CopyScores, EndProjection, GenerationGate
from .rnn_packed import PackedRows, pack, packing_reason
from .rnn_state import RNNState
from .transformer_packed import Fingerprint

_NAME = "RNNSeq2Seq"


class DecoderOutputs(NamedTuple):
    """What a loss needs of teacher-forced targets."""

    hidden: Tensor
    """``[B, T, H]``: what ``project`` takes."""
    attention: Tensor | None
    """``[B, T, S']`` fp32: where each step looked; None without attention."""
    copy: Tensor | None
    """``[B, T, S']``: weights (pointer-generator) or scores (CopyNet, pointer network) of copying;
    None where nothing is copied."""
    gate: Tensor | None
    """``[B, T]``: a pointer-generator's logit of generating."""


class Sources(Protocol):
    """What embedding and copying look at in every step."""

    @property
    def lengths(self) -> Tensor | None:
        """``[B]``: of what the encoder made; None where all are S'."""
        ...

    @property
    def keys(self) -> Tensor | None:
        """``[B, S', A]``: of a copying head that has scores of its own."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """``[B, S']``: the extended token that copying a position writes."""
        ...

    @property
    def table(self) -> Tensor | None:
        """``[B, 3 + S', E]``: a pointer network's embeddings."""
        ...


class Reading(NamedTuple):
    """Sources that were read; they are ``Sources``."""

    beginning: Beginning
    lengths: Tensor | None
    keys: Tensor | None
    tokens: Tensor | None
    table: Tensor | None


class RNNSeq2Seq(RNNDecoding, nn.Module):
    """Recurrent encoder-decoder, for training and for generation.

    Training calls ``outputs`` and ``target_nll`` (or ``decode`` and ``project``, as with the
    Transformer, where nothing is copied). Generation calls ``start``, ``step``, ``reorder`` and
    ``replace``; see ``fused_attn.generation.Decoder``. Sequences are padded at their end; what
    stands behind a length is never looked at, and what comes out there is unspecified. A source of
    length 0 is read as zeros, without a gradient.

    ``S'`` is the number of positions that the encoder sees: S, or ``ceil(S / time_reduction)``.

    Args:
        config: The model's shape; kept as ``config``.

    References: Sutskever et al., 2014. https://arxiv.org/abs/1409.3215
        Bahdanau et al., 2015. https://arxiv.org/abs/1409.0473
        Luong et al., 2015. https://arxiv.org/abs/1508.04025
    """

    # The packed copy of the weights with what it was made of; no module, so in no state dict.
    _packed: tuple[Fingerprint, RNNSeq2Seq] | None = None

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        E, H = config.embedding_size, config.hidden_size
        # A shared matrix is registered once, as the target's embedding.
        self.target_embedding = nn.Embedding(config.target_vocab_size, E, config.pad_token)
        self.source_embedding: nn.Embedding | None = None
        self.front_end: FrontEnd | None = None
        if config.source_features > 0:
            self.front_end = FrontEnd(
                config.front_end, config.source_features, E, config.time_reduction
            )
        elif config.tie_embeddings != "all":
            self.source_embedding = nn.Embedding(config.source_vocab_size, E, config.pad_token)
        self.encoder = RNNEncoder(config)
        self.decoder = RNNDecoder(config)
        self.output_projection: nn.Module | None = None
        self.copy_scores: CopyScores | None = None
        self.position_embedding: nn.Linear | None = None
        self.generation_gate: GenerationGate | None = None
        if config.output == "pointer":
            self.output_projection = EndProjection(H, config.eos_token)
            self.position_embedding = nn.Linear(H, E)
        elif config.tie_embeddings == "none":
            self.output_projection = nn.Linear(H, config.target_vocab_size, bias=False)
        if config.output in ("copynet", "pointer"):
            self.copy_scores = CopyScores(config)
        if config.output == "pointer_generator":
            self.generation_gate = GenerationGate(config, H)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, by ``config.initialization``."""
        initialize(self, self.config.initialization)

    # --- training ---------------------------------------------------------------------------

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of each target position's next token, given the target up to it.

        Args:
            source: ``[B, S]`` token indices, or ``[B, S, F]`` features.
            target: ``[B, T]`` token indices, beginning with ``bos_token``.
            source_lengths: ``[B]`` int32 or int64. Default: all S.
            target_lengths: ``[B]`` likewise; a target's steps never depend on it.

        Returns:
            ``[B, T, V]``; of a copying model log-probabilities ``[B, T, config.extended_size]``,
            fp32.

        Raises:
            ValueError: Shapes disagree or a sequence is longer than ``config.max_length``.
        """
        reading = self._read(source, source_lengths)
        return self._predict(self._outputs(reading, target, 0.0), reading)

    def decode(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, H]``: ``outputs(...).hidden``. Arguments and errors are those of ``forward``."""
        return self.outputs(source, target, source_lengths, target_lengths).hidden

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``, without what is copied."""
        if self.output_projection is None:
            return F.linear(hidden, self.target_embedding.weight)
        return self.output_projection(hidden)

    def outputs(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        *,
        sampling_probability: float = 0.0,
    ) -> DecoderOutputs:
        """Run over teacher-forced targets, up to the vocabulary.

        All steps of the recurrence are one call, and so is the attention; with input feeding or
        sampling there is a loop over T.

        Args:
            source: See ``forward``.
            target: See ``forward``.
            source_lengths: See ``forward``.
            target_lengths: See ``forward``.
            sampling_probability: The chance that a step reads the word that the model likes best
                after the step before, in place of the target's (Bengio et al., 2015,
                https://arxiv.org/abs/1506.03099). That choice has no gradient.

        Raises:
            ValueError: As ``forward``, or the probability is out of range.
        """
        if not 0.0 <= sampling_probability <= 1.0:
            raise ValueError(
                f"{_NAME}: sampling_probability must be in [0, 1], got {sampling_probability}"
            )
        return self._outputs(self._read(source, source_lengths), target, sampling_probability)

    def target_nll(
        self,
        outputs: DecoderOutputs,
        source: Tensor,
        target_output: Tensor,
        source_lengths: Tensor | None = None,
        rows: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Negative log-likelihood of the next words, summed.

        Args:
            outputs: From ``outputs``.
            source: ``[B, S]`` or ``[B, S, F]``, as it was read.
            target_output: ``[B, T]``: what follows each target position, in extended ids.
            source_lengths: ``[B]``. Default: all S.
            rows: ``[N]`` int64: the positions of ``target_output.flatten()`` that count; others
                are projected onto no vocabulary. Default: all.
            label_smoothing: See ``torch.nn.functional.cross_entropy``.

        Returns:
            A scalar, fp32.

        Raises:
            ValueError: Labels are to be smoothed over a vocabulary that copies extend.
        """
        if self.config.copies and label_smoothing != 0.0:
            raise ValueError(
                f"{_NAME}: label_smoothing must be 0 with output {self.config.output!r}, got "
                f"{label_smoothing}"
            )
        words = target_output.flatten()
        parts = [None if part is None else part.flatten(0, 1) for part in outputs]
        if rows is not None:
            words = words.index_select(0, rows)
            parts = [None if part is None else part.index_select(0, rows) for part in parts]
        hidden, _, copy, gate = parts
        assert hidden is not None
        logits = self.project(hidden)
        if copy is None:
            return F.cross_entropy(
                logits.float(), words, reduction="sum", label_smoothing=label_smoothing
            )
        tokens = self._copied_tokens(source, copy.size(1))
        lengths = self._positions(source_lengths)
        T = target_output.size(1)
        if rows is None:
            rows = torch.arange(len(words), device=words.device)
        sentences = rows // T
        return copy_nll(
            logits,
            copy,
            tokens.index_select(0, sentences),
            words,
            gate,
            source_lengths=None if lengths is None else lengths.index_select(0, sentences),
        ).sum()

    # --- reading ----------------------------------------------------------------------------

    def _read(self, source: Tensor, source_lengths: Tensor | None) -> Reading:
        self._check_source(source)
        lengths = source_lengths
        if self.front_end is not None:
            x, lengths = self.front_end(source, source_lengths)
        else:
            embedding = self.source_embedding or self.target_embedding
            x = self._lookup(source, embedding)
        encoded = self.encoder(self._drop(x), lengths)
        keys = tokens = table = None
        if self.copy_scores is not None:
            keys = self.copy_scores.read(encoded.memory)
        if self.config.copies:
            tokens = self._copied_tokens(source, encoded.memory.size(1))
        if self.position_embedding is not None:
            words = self.target_embedding.weight.expand(len(source), -1, -1)
            table = torch.cat([words, self.position_embedding(encoded.memory)], dim=1)
        return Reading(self.decoder.begin(encoded), lengths, keys, tokens, table)

    def _copied_tokens(self, source: Tensor, positions: int) -> Tensor:
        """``[B, S']``: the extended token that each source position would write."""
        if self.config.output != "pointer":
            return source
        first = POINTER_VOCABULARY
        index = torch.arange(first, first + positions, device=source.device)
        return index.expand(len(source), -1)

    def _positions(self, source_lengths: Tensor | None) -> Tensor | None:
        """From lengths of sources to those of the memory."""
        if source_lengths is None:
            return None
        r = self.config.time_reduction
        return (source_lengths + r - 1) // r

    def _lookup(self, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        if self.config.extra_tokens > 0:
            is_outside = tokens >= self.config.target_vocab_size
            tokens = tokens.masked_fill(is_outside, self.config.unknown_token)
        return embedding(tokens)

    def _embed(self, tokens: Tensor, sources: Sources) -> Tensor:
        """``[B, T, E]`` of target tokens ``[B, T]``."""
        table = sources.table
        if table is None:
            return self._lookup(tokens, self.target_embedding)
        return table.gather(1, tokens[:, :, None].expand(-1, -1, table.size(2)))

    # --- writing ----------------------------------------------------------------------------

    def _outputs(
        self, reading: Reading, target: Tensor, sampling_probability: float
    ) -> DecoderOutputs:
        self._check_target(target, reading)
        if sampling_probability == 0.0:
            x = self._drop(self._embed(target, reading))
            decoded = self.decoder(x, reading.beginning)
        else:
            decoded, x = self._sample(target, reading, sampling_probability)
        return self._finish(decoded, x, reading)

    def _sample(
        self, target: Tensor, reading: Reading, probability: float
    ) -> tuple[Decoded, Tensor]:
        decoder, beginning = self.decoder, reading.beginning
        is_own = torch.rand(target.shape, device=target.device) < probability
        carried = decoder.carry(beginning)
        steps: list[Decoded] = []
        inputs: list[Tensor] = []
        for t in range(target.size(1)):
            tokens = target[:, t : t + 1]
            if t > 0:
                with torch.no_grad():
                    found = self._finish(steps[-1], inputs[-1], reading)
                    own = self._predict(found, reading).argmax(dim=-1)
                tokens = torch.where(is_own[:, t : t + 1], own, tokens)
            x = self._drop(self._embed(tokens, reading))
            inputs.append(x)
            decoded, carried = decoder.step(
                decoder.inputs(x, beginning.context), carried, beginning.memory
            )
            steps.append(decoded)
        return join(steps), torch.cat(inputs, dim=1)

    def _finish(self, decoded: Decoded, x: Tensor, sources: Sources) -> DecoderOutputs:
        """Let the copying head look at the steps ``[B, T, ...]`` with inputs ``[B, T, E]``."""
        copy = gate = None
        if self.copy_scores is not None:
            assert sources.keys is not None
            copy = self.copy_scores(decoded.hidden, sources.keys, sources.lengths)
        elif self.generation_gate is not None:
            assert decoded.context is not None
            copy = decoded.weights
            gate = self.generation_gate(decoded.context, decoded.state, x)
        return DecoderOutputs(decoded.hidden, decoded.weights, copy, gate)

    def _predict(self, outputs: DecoderOutputs, sources: Sources) -> Tensor:
        """Logits ``[B, T, V]`` or log-probabilities ``[B, T, V + ...]``."""
        logits = self.project(outputs.hidden)
        if outputs.copy is None:
            return logits
        assert sources.tokens is not None
        return copy_distribution(
            logits,
            outputs.copy,
            sources.tokens[:, None],
            outputs.gate,
            extended_size=self.config.extended_size,
            source_lengths=sources.lengths,
        )

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    # --- generation -------------------------------------------------------------------------

    @torch.no_grad()
    def align(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Where each token of a given target looks; see ``fused_attn.generation.Decoder``.

        What ``cross_attention`` returns, 0 behind the targets' lengths.

        Args:
            source: See ``forward``.
            target: ``[B, T]`` token indices, beginning with ``bos_token``. Row t is of the step
                that reads ``target[:, t]`` and predicts what follows.
            source_lengths: ``[B]``. Default: all S.
            target_lengths: ``[B]``. Default: all T.

        Returns:
            ``[B, T, S]``.

        Raises:
            ValueError: As ``forward``, or the model neither attends nor copies.
        """
        check_looks(self.config)
        reading = self._read(source, source_lengths)
        weights = self._looked(self._outputs(reading, target, 0.0), reading)
        assert weights is not None
        weights = spread(weights, source_lengths, self.config.time_reduction)
        weights = weights[:, :, : source.size(1)]
        if target_lengths is None:
            return weights
        behind = torch.arange(target.size(1), device=target.device) >= target_lengths[:, None]
        return weights.masked_fill(behind[:, :, None], 0.0)

    def begin(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> dict[str, Any]:
        """Read sources for generation; see ``rnn_decoding.Program``."""
        reading = self._read(source, source_lengths)
        beginning = reading.beginning
        return {
            "carried": self.decoder.carry(beginning, beam_size),
            "memory": beginning.memory,
            "source_lengths": source_lengths,
            "lengths": reading.lengths,
            "context": beginning.context,
            "keys": reading.keys,
            "tokens": reading.tokens,
            "table": reading.table,
        }

    def advance(self, tokens: Tensor, state: RNNState) -> Tensor:
        """One step of generation; see ``rnn_decoding.Program``."""
        if state.table is not None:
            # A target that has no continuation goes on with any token.
            tokens = tokens.clamp(max=state.table.size(1) - 1)
        x = self._embed(tokens, state)
        decoded, carried = self.decoder.step(
            self.decoder.inputs(x, state.context), state.carried(), state.memory
        )
        outputs = self._finish(decoded, x, state)
        state.advance(carried, self._looked(outputs, state))
        return self._predict(outputs, state)

    def _program(self) -> RNNSeq2Seq:
        if self.training:
            raise RuntimeError(
                f"{_NAME}: generation needs the model in evaluation mode (model.eval()), got "
                "training mode"
            )
        if not _packs(self):
            self._packed = None
            return self
        if self._packed is None or not self._packed[0].holds():
            self._packed = None  # before its successor needs the memory
            twin = pack(self)
            if twin.output_projection is None:
                twin.output_projection = PackedRows(self.target_embedding.weight, None)
            self._packed = Fingerprint(self), twin
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed copy, which is made again where it is needed."""
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state

    def _looked(self, outputs: DecoderOutputs, sources: Sources) -> Tensor | None:
        """``[B, T, S']``: weights of attention, or of copying where there is none."""
        if outputs.attention is not None or outputs.copy is None:
            return outputs.attention
        scores = outputs.copy.float()
        if sources.lengths is None:
            return scores.softmax(dim=-1)
        index = torch.arange(scores.size(2), device=scores.device)
        behind = (index >= sources.lengths[:, None])[:, None]
        # Finite, so that a source of length 0 has weights 0 and no NaN.
        lowest = torch.finfo(torch.float32).min
        return scores.masked_fill(behind, lowest).softmax(dim=-1).masked_fill(behind, 0.0)

    # --- checks -----------------------------------------------------------------------------

    def _check_source(self, source: Tensor) -> None:
        features = self.config.source_features
        if features == 0:
            if source.dim() != 2:
                raise ValueError(
                    f"{_NAME}: source must have shape [B, S], got {list(source.shape)}"
                )
        elif source.dim() != 3 or source.size(2) != features:
            raise ValueError(
                f"{_NAME}: source must have shape [B, S, F] with F = {features} "
                f"(config.source_features), got {list(source.shape)}"
            )
        self._check_length("source", source)

    def _check_target(self, target: Tensor, reading: Reading) -> None:
        B = reading.beginning.context.size(0)
        if target.dim() != 2 or target.size(0) != B:
            raise ValueError(
                f"{_NAME}: target must have shape [B, T] with B = {B} (from source), got "
                f"{list(target.shape)}"
            )
        self._check_length("target", target)

    def _check_length(self, name: str, sequence: Tensor) -> None:
        if sequence.size(1) > self.config.max_length:
            raise ValueError(
                f"{_NAME}: {name} must have at most {self.config.max_length} positions "
                f"(config.max_length), got {sequence.size(1)}"
            )


def _packs(model: RNNSeq2Seq) -> bool:
    """Whether ``start`` computes with packed weights."""
    return (
        layers.packing_unavailable_reason() == ""
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and packing_reason(model) == ""
    )
