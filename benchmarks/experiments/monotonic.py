"""``python -m benchmarks.experiments.monotonic``: attention that must go forwards.

Models with one architecture and different attention learn to write down generated recordings
(``fused_attn.training.synthetic_speech``), and are tested on others of the same length and on
longer ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_attn.generation import Greedy
from fused_attn.models import RNNSeq2SeqConfig
from fused_attn.training import (
    FeatureDataset,
    Vocabularies,
    Vocabulary,
    error_rate,
    exact_match,
)
from fused_attn.training.synthetic_speech import SyntheticSpeech
from fused_attn.training.translator import Translator

from . import _common

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "additive": ({"attention": "additive"}, {}),
    "additive, guided": ({"attention": "additive"}, {"guided_attention": 1.0}),
    "location": ({"attention": "location"}, {}),
    "location, guided": ({"attention": "location"}, {"guided_attention": 1.0}),
    "monotonic": ({"attention": "additive", "monotonic": True}, {}),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    _common.add_arguments(parser, steps=300)
    _common.select_forms(parser, list(FORMS))
    parser.add_argument("--recordings", type=int, default=4000, metavar="N", help="default: 4000")
    parser.add_argument("--test", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--letters", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--time-reduction", type=int, default=1, metavar="N", help="frames a position; default: 1"
    )
    parser.add_argument("--noise", type=float, default=0.5, metavar="X", help="default: 0.5")
    parser.add_argument(
        "--longest", type=int, default=30, metavar="N", help="letters of a text; default: 30"
    )
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    longest = arguments.longest
    speech = SyntheticSpeech(
        letters=arguments.letters,
        noise=arguments.noise,
        shortest=max(1, longest // 2),
        longest=longest,
    )
    longer = dataclasses.replace(speech, shortest=longest + 1, longest=longest * 3 // 2)
    frames, texts = speech.generate(arguments.recordings, seed=arguments.seed)
    vocabulary = Vocabulary.train(texts, 64, model_type="char", leading_space=False)
    tests = {
        name: kind.generate(arguments.test, seed=arguments.seed + 1)
        for name, kind in (("as long", speech), ("longer", longer))
    }
    dataset = FeatureDataset(frames, vocabulary.encode(texts))
    held_out = FeatureDataset(tests["as long"][0], vocabulary.encode(tests["as long"][1]))
    print(
        f"{len(frames)} recordings of {speech.shortest} to {speech.longest} letters, "
        f"{frames.lengths.mean():.0f} frames on average; longer ones have {longer.shortest} to "
        f"{longer.longest}"
    )
    if arguments.out is not None:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        tests["as long"][0].save(Path(arguments.out) / "test.npz")
    vocabularies = Vocabularies(vocabulary, vocabulary)
    rows = []
    chosen = arguments.form or list(FORMS)
    for name in chosen:
        fields, settings = FORMS[name]
        config = RNNSeq2SeqConfig(
            target_vocab_size=len(vocabulary),
            source_features=speech.features,
            time_reduction=arguments.time_reduction,
            embedding_size=arguments.hidden,
            hidden_size=arguments.hidden,
            num_encoder_layers=1,
            num_decoder_layers=1,
            dropout=0.0,
            bridge="mean",
            tie_embeddings="output",
            **fields,
        )
        model, loss = _common.train(
            name,
            config,
            vocabularies,
            dataset,
            held_out,
            arguments,
            models=len(chosen),
            max_tokens=2048,
            **settings,
        )
        translator = Translator(model, vocabularies)
        row = [name, f"{loss:.3f}"]
        for recordings, references in tests.values():
            found = translator.translate([*recordings], strategy=Greedy())
            row.append(f"{100 * error_rate(found, references):.1f} %")
            row.append(f"{100 * exact_match(found, references):.0f} %")
        rows.append(row)
    _common.print_table(
        ("attention", "loss", "letter errors", "exact", "letter errors, longer", "exact, longer"),
        rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
