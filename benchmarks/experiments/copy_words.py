"""``python -m benchmarks.experiments.copy_words``: names that no vocabulary has.

Models with one architecture and different outputs learn to translate sentences about people and
places (``fused_attn.training.synthetic_copy``). The vocabulary holds the words of the templates
alone, and the names of the test set are in no training sentence: one that generates translates
none of them exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from fused_attn.generation import BeamSearch
from fused_attn.models import RNNSeq2SeqConfig
from fused_attn.training import (
    ParallelDataset,
    ParallelText,
    Vocabularies,
    Vocabulary,
    error_rate,
    exact_match,
    make_codec,
)
from fused_attn.training.synthetic_copy import copy_words, generate_copy_pairs
from fused_attn.training.translator import Translator

from . import _common

_EXTRA_TOKENS = 8
_SHOWN = 3

FORMS: dict[str, dict[str, Any]] = {
    "generate": {},
    "pointer_generator": {"output": "pointer_generator", "extra_tokens": _EXTRA_TOKENS},
    "copynet": {"output": "copynet", "extra_tokens": _EXTRA_TOKENS},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    _common.add_arguments(parser, steps=400)
    _common.select_forms(parser, list(FORMS))
    parser.add_argument("--pairs", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--test", type=int, default=300, metavar="N", help="default: 300")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    pairs = generate_copy_pairs(arguments.pairs + arguments.test, seed=arguments.seed)
    training, test = pairs[: -arguments.test], pairs[-arguments.test :]
    vocabulary = Vocabulary.train(
        [side for pair in training for side in pair], len(copy_words()) + 4, model_type="word"
    )
    seen = {word for pair in training for word in pair[0].split()}
    names = [word for source, _ in test for word in source.split() if word not in copy_words()]
    new = sum(name not in seen for name in names) / len(names)
    print(
        f"{len(training)} pairs, vocabulary of {len(vocabulary)}, {len(test)} test pairs, "
        f"{100 * new:.1f} % of whose names are in no training pair"
    )
    vocabularies = Vocabularies(vocabulary, vocabulary)
    references = [reference for _, reference in test]
    words = [reference.split() for reference in references]
    rows = []
    chosen = arguments.form or list(FORMS)
    for name in chosen:
        config = RNNSeq2SeqConfig(
            source_vocab_size=len(vocabulary),
            target_vocab_size=len(vocabulary),
            embedding_size=arguments.hidden,
            hidden_size=arguments.hidden,
            num_encoder_layers=1,
            num_decoder_layers=1,
            input_feeding=True,
            tie_embeddings="all",
            **FORMS[name],
        )
        codec = make_codec(vocabularies, config)
        model, _ = _common.train(
            name,
            config,
            vocabularies,
            ParallelDataset.encode_by(codec, ParallelText.from_pairs(training)),
            ParallelDataset.encode_by(codec, ParallelText.from_pairs(test)),
            arguments,
            models=len(chosen),
            max_tokens=1024,
        )
        translator = Translator(model, vocabularies)
        found = translator.translate(
            [source for source, _ in test], strategy=BeamSearch(beam_size=4)
        )
        for (source, _), output in list(zip(test, found, strict=True))[:_SHOWN]:
            print(f"{name:<18} {source}\n{'':<18} {output}")
        errors = 100 * error_rate([text.split() for text in found], words)
        exact = 100 * exact_match(found, references)
        rows.append((name, f"{errors:.1f} %", f"{exact:.1f} %"))
    _common.print_table(("output", "word errors", "exactly right"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
