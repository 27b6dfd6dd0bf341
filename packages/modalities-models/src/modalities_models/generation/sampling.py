"""From logits to the next token of every row.

Shape suffixes: B rows, V vocabulary size, K candidates of a row, most likely first, S tokens of a row so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modalities_core.errors import ConfigError, NumericalError

NUCLEUS_CANDIDATES = 512
"""``top_p`` first looks at so many of the most likely tokens, and sorts the vocabulary only where they fall short."""
DRAWN_AT_ONCE = 256
"""Random numbers a prompt draws at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the steps are taken in this order.

    Args:
        repetition_penalty: divides positive logits of tokens that stand in the prompt or its continuation already,
            and multiplies negative ones (CTRL, arXiv:1909.05858); 1 changes nothing.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens that has at least this probability
            (arXiv:1904.09751).
        min_p: sample from tokens that are at least this fraction as likely as the most likely one (arXiv:2407.01082).

    Raises:
        ConfigError: a number is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be above 0, not {self.repetition_penalty}",
                hint="above 1 discourages tokens that occurred, 1 changes nothing",
                about=(None, "repetition_penalty"),
            )
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature}", about=(None, "temperature"))
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}", about=(None, "top_k"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is a probability in (0, 1], not {self.top_p}", about=(None, "top_p"))
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is a fraction in [0, 1], not {self.min_p}", about=(None, "min_p"))


class Sampler:
    """Chooses tokens for the prompts of a batch; remembers which were seen and how many numbers were drawn.

    Args:
        sampling: how to choose.
        prompts: ids of each.
        seeds: one per prompt.
        max_new_tokens: the most calls of ``choose``.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
    ) -> None:
        self.sampling = sampling
        self._uniforms = [uniforms(seed) for seed in seeds]
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._columns = max(map(len, prompts))
            # The order of ids does not matter: shorter prompts are filled up with their first.
            rows = [[*prompt, *[prompt[0]] * (self._columns - len(prompt))] for prompt in prompts]
            self._seen = torch.nn.functional.pad(torch.tensor(rows), (0, max_new_tokens))

    def choose(self, prompts: list[int], logits_BV: Tensor) -> list[int]:
        """The next token of each of ``prompts``, indices in any order, from logits (B, V).

        Raises:
            NumericalError: see :func:`choose`.
        """
        if logits_BV.dtype in (torch.bfloat16, torch.float16):
            logits_BV = logits_BV.float()
        device = logits_BV.device
        uniform_B = None
        if self.sampling.temperature > 0:
            numbers = [next(self._uniforms[prompt]) for prompt in prompts]
            uniform_B = torch.tensor(numbers, dtype=torch.float64, device=device)
        seen_BS = None
        if self._seen is not None:
            self._seen = self._seen.to(device)
            seen_BS = self._seen[prompts, : self._columns]
        tokens_B = choose(logits_BV, self.sampling, uniform_B, seen_BS)
        if self._seen is not None:
            # The others have ended; what stands in their rows is not read again.
            self._seen[prompts, self._columns] = tokens_B
            self._columns += 1
        return tokens_B.tolist()


def uniforms(seed: int) -> Iterator[float]:
    """Numbers in [0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(DRAWN_AT_ONCE, dtype=torch.float64, generator=generator).tolist()


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None, seen_BS: Tensor | None = None) -> Tensor:
    """One token per row, (B,) int64.

    Args:
        logits_BV: float32 or wider.
        sampling: how to choose.
        uniform_B: float64 in [0, 1), what decides each row's sample; not needed at temperature 0.
        seen_BS: int64 ids the repetition penalty applies to, in any order and number; not needed where it is 1.

    Raises:
        NumericalError: a logit is NaN, or infinite where a row needs a number.
    """
    if sampling.repetition_penalty != 1.0:
        assert seen_BS is not None, "the penalty is for tokens that were seen"
        logits_BV = penalise(logits_BV, seen_BS, sampling.repetition_penalty)
    if sampling.temperature == 0:
        largest_B, tokens_B = logits_BV.max(-1)
        _require_numbers(largest_B)
        return tokens_B
    assert uniform_B is not None, "sampling needs numbers to decide by"
    logits_BK, ids_BK = candidates(logits_BV, sampling)
    _require_numbers(logits_BK[:, 0] if ids_BK is not None else logits_BK.amax(-1))
    # Summed in float64: in float32 the rarest of 100,000 tokens would vanish beside the sum of the others.
    sums_BK = logits_BK.softmax(-1).cumsum(-1, dtype=torch.float64)
    places_B1 = torch.searchsorted(sums_BK, uniform_B[:, None] * sums_BK[:, -1:], right=True)
    places_B1.clamp_(max=sums_BK.shape[1] - 1)
    return (places_B1 if ids_BK is None else ids_BK.gather(1, places_B1))[:, 0]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What is sampled from: logits (B, K) over the temperature, -inf where refused, and their ids (B, K).

    The ids are None where the candidates are the whole vocabulary in its own order; otherwise the most likely come
    first. The vocabulary is sorted only where ``top_p`` has to reach beyond ``NUCLEUS_CANDIDATES`` tokens.
    """
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    if sampling.top_k is not None:
        logits_BK, ids_BK = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]))
        logits_BK = (logits_BK - logits_BK[:, :1]) / sampling.temperature
        if sampling.top_p is not None and sampling.top_p < 1:
            logits_BK = keep_top_p(logits_BK, logits_BK.logsumexp(-1, keepdim=True), sampling.top_p)
    else:
        logits_BK, ids_BK = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature, None
        if sampling.top_p is not None and sampling.top_p < 1:
            logits_BK, ids_BK = _nucleus(logits_BK, sampling.top_p)
    if sampling.min_p:
        logits_BK = logits_BK.masked_fill(logits_BK < math.log(sampling.min_p), -math.inf)
    return logits_BK, ids_BK


def keep_top_p(logits_BK: Tensor, total_B1: Tensor, p: float) -> Tensor:
    """Logits with all at -inf but the smallest set of most likely tokens whose probability is at least ``p``.

    Args:
        logits_BK: most likely first.
        total_B1: logarithm of the sum of the exponentials that the probabilities are relative to.
        p: the probability; the most likely token stays whatever it is.
    """
    probabilities_BK = (logits_BK - total_B1).exp()
    drop_BK = probabilities_BK.cumsum(-1) - probabilities_BK >= p
    drop_BK[:, 0] = False
    return logits_BK.masked_fill(drop_BK, -math.inf)


def _nucleus(logits_BV: Tensor, p: float) -> tuple[Tensor, Tensor]:
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    count = min(NUCLEUS_CANDIDATES, logits_BV.shape[1])
    logits_BK, ids_BK = logits_BV.topk(count)
    if count < logits_BV.shape[1] and bool(((logits_BK - total_B1).exp().sum(-1) < p).any()):
        logits_BK, ids_BK = logits_BV.sort(descending=True)
    return keep_top_p(logits_BK, total_B1, p), ids_BK


def penalise(logits_BV: Tensor, seen_BS: Tensor, penalty: float) -> Tensor:
    """Logits of the ids in ``seen_BS`` divided by ``penalty`` where positive, multiplied where negative."""
    seen_logits_BS = logits_BV.gather(1, seen_BS)
    changed_BS = torch.where(seen_logits_BS > 0, seen_logits_BS / penalty, seen_logits_BS * penalty)
    # An id that stands there twice writes the same value twice.
    return logits_BV.scatter(1, seen_BS, changed_BS)


def _require_numbers(largest_B: Tensor) -> None:
    """The largest of a row is NaN if any is."""
    if not bool(largest_B.isfinite().all()):
        raise NumericalError("the model's logits are not numbers", hint="its weights may be damaged or have diverged")
