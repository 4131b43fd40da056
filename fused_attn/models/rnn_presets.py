"""Recurrent sequence-to-sequence models of the literature."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

_PRESETS: dict[str, dict[str, Any]] = {
    "sutskever2014": {
        "cell": "lstm",
        "embedding_size": 1000,
        "hidden_size": 1000,
        "num_encoder_layers": 4,
        "num_decoder_layers": 4,
        "bidirectional": False,
        "reverse_source": True,
        "dropout": 0.0,
        "attention": "none",
        "initialization": "uniform",
    },
    "cho2014": {
        "cell": "gru",
        "embedding_size": 100,
        "hidden_size": 1000,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "bidirectional": False,
        "dropout": 0.0,
        "bridge": "linear",
        "context": "every_step",
        "attention": "none",
    },
    "bahdanau2015": {
        "cell": "gru",
        "embedding_size": 620,
        "hidden_size": 1000,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dropout": 0.0,
        "bridge": "linear",
        "attention": "additive",
        "input_feeding": True,
    },
    "luong2015": {
        "cell": "lstm",
        "embedding_size": 1000,
        "hidden_size": 1000,
        "num_encoder_layers": 4,
        "num_decoder_layers": 4,
        "bidirectional": False,
        "reverse_source": True,
        "attention": "general",
        "input_feeding": True,
        "initialization": "uniform",
    },
    "see2017": {
        "cell": "lstm",
        "embedding_size": 128,
        "hidden_size": 512,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dropout": 0.0,
        "bridge": "linear",
        "attention": "additive",
        "coverage": True,
        "input_feeding": True,
        "output": "pointer_generator",
        "extra_tokens": 100,
    },
    "gu2016": {
        "cell": "gru",
        "embedding_size": 500,
        "hidden_size": 500,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dropout": 0.0,
        "bridge": "linear",
        "attention": "additive",
        "input_feeding": True,
        "output": "copynet",
        "extra_tokens": 100,
    },
    "vinyals2015": {
        "cell": "lstm",
        "target_vocab_size": 3,
        "source_features": 2,
        "embedding_size": 512,
        "hidden_size": 512,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "bidirectional": False,
        "dropout": 0.0,
        "attention": "none",
        "output": "pointer",
        "initialization": "uniform",
    },
}

RNN_PRESETS = MappingProxyType(_PRESETS)
"""Fields of published models by name. What differs from the papers:

- ``sutskever2014``: https://arxiv.org/abs/1409.3215.
- ``cho2014``: https://arxiv.org/abs/1406.1078; without its maxout output layer.
- ``bahdanau2015``: https://arxiv.org/abs/1409.0473; the attention follows the recurrence, in
  Luong's order, and its result is fed to the next step; no maxout.
- ``luong2015``: https://arxiv.org/abs/1508.04025; global attention.
- ``see2017``: https://arxiv.org/abs/1704.04368; the decoder is as wide as both of the encoder's
  directions, and the attention follows the recurrence.
- ``gu2016``: https://arxiv.org/abs/1603.06393; without its selective read.
- ``vinyals2015``: https://arxiv.org/abs/1506.03134, for points in the plane.
"""
