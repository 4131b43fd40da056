"""The recurrent encoder-decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_attn.ops import copy_nll

from .rnn_decoder import Decoded, join
from .rnn_decoding import RNNDecoding, check_looks, spread
from .rnn_network import DecoderOutputs, Reading

_NAME = "RNNSeq2Seq"


class RNNSeq2Seq(RNNDecoding):
    """Recurrent encoder-decoder, for training and for generation.

    Training calls ``outputs`` and ``target_nll`` (or ``decode`` and ``project``, as with the
    Transformer, where nothing is copied). Generation calls ``start``, ``step``, ``reorder`` and
    ``replace``; see ``fused_attn.generation.Decoder``. Sequences are padded at their end; what
    stands behind a length is never looked at, and what comes out there is unspecified. A source of
    length 0 is read as zeros, without a gradient.

    On a CPU, in fp32, generation computes with a packed copy of the weights, as a ``Transformer``
    does. There a sentence's logits have the same bits in every batch, but for models with
    multiplicative attention (``dot``, ``general``, ``scaled_dot``) or CopyNet's scores, which are
    plain matrix products of queries and keys.

    ``S'`` is the number of positions that the encoder sees: S, or ``ceil(S / time_reduction)``.

    Args:
        config: The model's shape; kept as ``config``.

    References: Sutskever et al., 2014. https://arxiv.org/abs/1409.3215
        Bahdanau et al., 2015. https://arxiv.org/abs/1409.0473
        Luong et al., 2015. https://arxiv.org/abs/1508.04025
    """

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
        S = source.size(1)
        if source_lengths is None:
            source_lengths = torch.full((len(source),), S, device=source.device)
        weights = spread(weights, source_lengths, self.config.time_reduction)[:, :, :S]
        if target_lengths is None:
            return weights
        behind = torch.arange(target.size(1), device=target.device) >= target_lengths[:, None]
        return weights.masked_fill(behind[:, :, None], 0.0)

    def _check_target(self, target: Tensor, reading: Reading) -> None:
        B = reading.beginning.context.size(0)
        if target.dim() != 2 or target.size(0) != B:
            raise ValueError(
                f"{_NAME}: target must have shape [B, T] with B = {B} (from source), got "
                f"{list(target.shape)}"
            )
        self._check_length("target", target)
