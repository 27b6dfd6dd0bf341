"""Text generation: one token after another, greedy or sampled.

Shape suffix: V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError, NumericalError
from modalities_core.interfaces import Model


def generate(
    model: Model,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_of_document: int | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """The tokens that follow ``tokens``, each as soon as it is known.

    What the model sees are the last ``model.sequence_length`` tokens; from the point where the beginning falls out
    of that window, every token costs a pass over the whole window. The model is in evaluation mode until the
    iterator is used up or closed, then as it was.

    Args:
        model: any Model; one with ``new_caches(capacity)``, whose result it takes as a second argument, reads each
            token only once while the window is not full.
        tokens: the prompt's ids, at least one.
        max_new_tokens: the most tokens to give.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens that has at least this probability
            (arXiv:1904.09751); applied after ``top_k``.
        seed: of the sampling; the same seed gives the same tokens on the same device.
        end_of_document: the id that ends the text; it is not given itself.
        cache: keep keys and values between tokens where the model can; False recomputes them.

    Raises:
        ConfigError: an argument is out of range, or a prompt id is not in the vocabulary.
        NumericalError: the model gave logits that are NaN.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, top_p)
    return _generate(model, list(tokens), max_new_tokens, temperature, top_k, top_p, seed, end_of_document, cache)


def _generate(
    model: Model,
    tokens: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    end_of_document: int | None,
    cache: bool,
) -> Iterator[int]:
    assert isinstance(model, nn.Module), "a Model is a torch module"
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    caches = None
    new_caches: Any = getattr(model, "new_caches", None)
    if cache and new_caches is not None:
        caches = new_caches(min(model.sequence_length, len(tokens) + max_new_tokens))
    training = model.training
    model.eval()
    try:
        unseen = tokens
        for _ in range(max_new_tokens):
            if caches is None or len(tokens) > model.sequence_length:
                unseen, caches = tokens[-model.sequence_length :], None
            logits_V = _next_logits(model, torch.tensor([unseen], device=device), caches)
            token = choose(logits_V, temperature, top_k, top_p, generator)
            if token == end_of_document:
                return
            yield token
            tokens.append(token)
            unseen = [token]
    finally:
        model.train(training)


@torch.no_grad()
def _next_logits(model: Any, tokens_BT: Tensor, caches: Any) -> Tensor:
    """Logits (V,) float32 of the token after the last."""
    hidden_BTD = model(tokens_BT) if caches is None else model(tokens_BT, caches)
    return model.head(hidden_BTD[0, -1]).float()


def choose(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from the logits (V,) float32 of its position.

    Raises:
        NumericalError: a logit is NaN.
    """
    if logits_V.isnan().any():
        raise NumericalError("the model's logits are not numbers", hint="its weights may be damaged or have diverged")
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    logits_V = (logits_V - logits_V.max()) / temperature
    if top_k is not None:
        logits_V = keep_top_k(logits_V, top_k)
    if top_p is not None:
        logits_V = keep_top_p(logits_V, top_p)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """``logits_V`` with all but the ``k`` largest at -inf; ties with the k-th largest stay."""
    if k >= logits_V.numel():
        return logits_V
    smallest = logits_V.topk(k).values[-1]
    return logits_V.masked_fill(logits_V < smallest, float("-inf"))


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """``logits_V`` with all at -inf but the smallest set of most likely tokens whose probability is at least ``p``.

    The most likely token always stays; of equally likely ones the lower id comes first.
    """
    if p >= 1.0:
        return logits_V
    probabilities, order = logits_V.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    drop = before >= p
    drop[0] = False
    return logits_V.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf"))


def _check(
    model: Model,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not tokens:
        raise ConfigError("the prompt has no token", hint="start from the end-of-document token for unprompted text")
    if outside := [token for token in tokens if not 0 <= token < model.vocab_size]:
        raise ConfigError(
            f"the prompt has token {outside[0]}, but the model's vocabulary is 0 to {model.vocab_size - 1}",
            hint="use the tokenizer the model was trained with",
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens cannot be negative: {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p is a probability in (0, 1], not {top_p}")
