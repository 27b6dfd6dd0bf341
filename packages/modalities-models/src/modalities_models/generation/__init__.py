"""Text generation: tokens one after another, greedy or sampled, for one prompt or many at once.

``generate`` gives the tokens after one prompt, ``generate_batch`` those after many as they come, and
``generate_text`` text, with stop strings. ``Sampling`` says how a token is chosen.
"""

from modalities_models.generation.decoding import FinishReason, NewToken, generate, generate_batch
from modalities_models.generation.sampling import Sampling
from modalities_models.generation.text import Continuation, Piece, generate_text

__all__ = [
    "Continuation",
    "FinishReason",
    "NewToken",
    "Piece",
    "Sampling",
    "generate",
    "generate_batch",
    "generate_text",
]
