"""Drop-in replacements of ``torch.nn``'s attention and Transformer modules."""

from ._attention_state import AttentionMemory, AttentionState
from ._residual import make_norm
from .layer_norm import AddLayerNorm, LayerNorm, RMSNorm
from .masked_batch_norm import MaskedBatchNorm
from .multihead_attention import MultiheadAttention
from .power_norm import PowerNorm
from .recurrent import RecurrentLayers
from .recurrent_attention import RecurrentAttention
from .transformer import Transformer
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "AttentionMemory",
    "AttentionState",
    "LayerNorm",
    "MaskedBatchNorm",
    "MultiheadAttention",
    "PowerNorm",
    "RMSNorm",
    "RecurrentAttention",
    "RecurrentLayers",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "make_norm",
]
