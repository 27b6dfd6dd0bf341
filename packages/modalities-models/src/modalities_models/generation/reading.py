"""What a model says behind the last token of several texts.

Texts of different lengths lie in one batch in two ways. With caches they end together, so that each further token is
one more column; what is left of the shorter ones is padding that the model is told of. Without caches they begin
together: no token of a causal model sees what comes after it, so nothing has to be said about the padding.

Shape suffixes: B texts, T columns, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modalities_core.interfaces import Model


class Reader:
    """Gives logits after growing texts; keeps what the model remembers of them between calls.

    Args:
        model: a Model, in evaluation mode.
        max_new_tokens: the most tokens a text grows by.
        cache: keep keys and values where the model can.
    """

    def __init__(self, model: Model, max_new_tokens: int, cache: bool) -> None:
        assert isinstance(model, nn.Module), "a Model is a torch module"
        self._model: Any = model
        self._window: int = model.sequence_length
        self._left = max_new_tokens
        self._device = next(model.parameters()).device
        self._new_caches: Any = getattr(model, "new_caches", None) if cache else None
        self._caches: Any = None
        self._cached: list[int] = []
        self._columns = 0
        self._padding_B: Tensor | None = None

    def read(self, texts: dict[int, list[int]]) -> tuple[list[int], Tensor]:
        """The keys of ``texts`` in the order of the rows, and logits (B, V) of the token after each text.

        Args:
            texts: ids so far; since the last call one token longer each, and some of them gone.
        """
        if self._new_caches is None:
            return list(texts), self._recompute(list(texts.values()))
        inside = {key: text for key, text in texts.items() if len(text) <= self._window}
        if len(inside) == len(texts):
            return self._continue(inside)
        self._caches = self._caches if inside else None
        beyond = [key for key in texts if key not in inside]
        logits_BV = self._recompute([texts[key] for key in beyond])
        if not inside:
            return beyond, logits_BV
        order, others_BV = self._continue(inside)
        return [*beyond, *order], torch.cat((logits_BV, others_BV))

    def _recompute(self, texts: list[list[int]]) -> Tensor:
        """Logits from a pass over all that fits into the window."""
        texts = [text[-self._window :] for text in texts]
        longest = max(map(len, texts))
        tokens_BT = self._tensor([[*text, *[text[-1]] * (longest - len(text))] for text in texts])
        ends_B = self._tensor([len(text) - 1 for text in texts])
        hidden_BTD = self._model(tokens_BT)
        return self._model.head(hidden_BTD[torch.arange(len(texts), device=self._device), ends_B])

    def _continue(self, texts: dict[int, list[int]]) -> tuple[list[int], Tensor]:
        """Logits from one more column, or from all columns where there are no caches that could take it."""
        if self._caches is None or self._columns == self._window:
            return list(texts), self._begin(texts)
        if 2 * len(texts) <= len(self._cached):
            self._drop_ended(texts)
        # Rows of texts that have ended go on with any token, until they are half of all.
        columns = [[texts[key][-1] if key in texts else 0] for key in self._cached]
        logits_BV = self._forward(self._tensor(columns))
        if len(texts) == len(self._cached):
            return self._cached, logits_BV
        places = [place for place, key in enumerate(self._cached) if key in texts]
        return [self._cached[place] for place in places], logits_BV[places]

    def _drop_ended(self, texts: dict[int, list[int]]) -> None:
        """Take the rows of texts that have ended out of the caches, where these can."""
        if not all(hasattr(cache, "keep") for cache in self._caches):
            return
        places = [place for place, key in enumerate(self._cached) if key in texts]
        rows = self._tensor(places)
        for cache in self._caches:
            cache.keep(rows)
        self._cached = [self._cached[place] for place in places]
        self._padding_B = None if self._padding_B is None else self._padding_B[rows]

    def _begin(self, texts: dict[int, list[int]]) -> Tensor:
        """Logits from a pass over whole texts into new caches."""
        longest = max(map(len, texts.values()))
        padding = [longest - len(text) for text in texts.values()]
        self._cached, self._columns = list(texts), 0
        self._padding_B = self._tensor(padding) if any(padding) else None
        self._caches = self._new_caches(min(self._window, longest + self._left))
        rows = [[*[text[0]] * pad, *text] for pad, text in zip(padding, texts.values(), strict=True)]
        return self._forward(self._tensor(rows))

    def _forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, V) of the token after the last column."""
        padding = {} if self._padding_B is None else {"padding_B": self._padding_B}
        hidden_BTD = self._model(tokens_BT, self._caches, **padding)
        self._columns += tokens_BT.shape[1]
        return self._model.head(hidden_BTD[:, -1])

    def _tensor(self, numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, device=self._device)
