"""Drop-in replacements of ``torch.nn``'s attention and Transformer modules."""

from .layer_norm import AddLayerNorm, LayerNorm
from .multihead_attention import MultiheadAttention
from .transformer import Transformer
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "LayerNorm",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
