"""One step of beam search over a batch."""

from .api import BeamSearchStep, beam_search_step

__all__ = ["BeamSearchStep", "beam_search_step"]
