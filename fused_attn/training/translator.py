"""Sentences in, sentences out: a model with its vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from fused_attn.generation import beam_search, greedy_search
from fused_attn.models import Transformer, TransformerConfig

from .checkpoint import Vocabularies, find_model, load_config, load_vocabularies, load_weights
from .data import ParallelDataset, TokenBatches
from .errors import CheckpointError


class Translator:
    """Translates text with a Transformer.

    Args:
        model: The model.
        vocabularies: Those it was trained with.
        max_tokens: Most source tokens decoded at once, padding counted.
    """

    def __init__(
        self, model: Transformer, vocabularies: Vocabularies, *, max_tokens: int = 4096
    ) -> None:
        self.model = model
        self.vocabularies = vocabularies
        self._max_tokens = max_tokens

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the source tokens of each sentence, without special ids."""
        return self.vocabularies.source.encode(sentences)

    def translate(
        self,
        sentences: Sequence[str],
        *,
        beam_size: int = 4,
        length_penalty: float = 1.0,
        progress: bool = False,
    ) -> list[str]:
        """Translate sentences, in their order; an empty sentence gives an empty one.

        They are decoded in batches of similar length, the longest first, so that memory runs
        out at once or not at all.

        Args:
            sentences: The source text.
            beam_size: Hypotheses kept a sentence; 1 is greedy search.
            length_penalty: Divides the log-probability by length to this power.
            progress: Show a progress bar on standard error.
        """
        tokens = self.encode(sentences)
        present = [index for index, ids in enumerate(tokens) if ids]
        dataset = ParallelDataset([tokens[index] for index in present], [[] for _ in present])
        batches = TokenBatches(dataset, max_tokens=self._max_tokens, seed=0).in_order()[::-1]
        device = next(self.model.parameters()).device
        output = [""] * len(sentences)
        training = self.model.training
        self.model.eval()
        try:
            with tqdm(
                total=len(present), unit=" sentences", desc="translate", disable=not progress
            ) as bar:
                for indices in batches:
                    batch = dataset.batch(indices).to(device)
                    if beam_size == 1:
                        found = greedy_search(self.model, batch.source, batch.source_lengths)
                    else:
                        found = [
                            hypotheses[0]
                            for hypotheses in beam_search(
                                self.model,
                                batch.source,
                                batch.source_lengths,
                                beam_size=beam_size,
                                length_penalty=length_penalty,
                            )
                        ]
                    texts = self.vocabularies.target.decode([best.tokens for best in found])
                    for index, text in zip(indices, texts, strict=True):
                        output[present[index]] = text
                    bar.update(len(indices))
        finally:
            self.model.train(training)
        return output


def load_translator(
    path: str | Path, *, device: str | torch.device = "cpu", max_tokens: int = 4096
) -> Translator:
    """Load a trained model with its vocabularies.

    Args:
        path: A checkpoint or the directory of a training run.
        device: Where to put the model.
        max_tokens: See ``Translator``.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged or of another kind of model.
    """
    checkpoint = find_model(path)
    fields, _ = load_config(checkpoint)
    try:
        config = TransformerConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'}: {error}") from error
    vocabularies = load_vocabularies(checkpoint)
    for side, vocabulary, size in (
        ("source", vocabularies.source, config.source_vocab_size),
        ("target", vocabularies.target, config.target_vocab_size),
    ):
        if len(vocabulary) != size:
            raise CheckpointError(
                f"{checkpoint / side}.spm: vocabulary of another model: it has {len(vocabulary)} "
                f"ids and the model {size}"
            )
    model = Transformer(config)
    model.load_state_dict(load_weights(checkpoint, model.state_dict()))
    return Translator(model.to(device).eval(), vocabularies, max_tokens=max_tokens)
