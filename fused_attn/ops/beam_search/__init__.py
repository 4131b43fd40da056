"""One step of beam search over a batch."""

from .api import BeamSearchStep, beam_search_step
from .edits import TokenEdits, token_edits

__all__ = ["BeamSearchStep", "TokenEdits", "beam_search_step", "token_edits"]
