"""Conversations to ids, and which of them count: those of characters the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from modalities_core.errors import DataError
from modalities_data.prepare.chat_template import ChatTemplate, strings
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer


class Encoded(NamedTuple):
    """One conversation: ids with the end of document, which of them count, and how many were cut by a border."""

    ids: np.ndarray
    mask: np.ndarray
    text_bytes: int
    cut: int


class TurnEnd(NamedTuple):
    """What a template writes behind an answer: a control token, or text to look for; None and empty where neither."""

    token: int | None
    text: str


class ChatEncoder:
    """Conversations to ids and masks, and to prompts for the next answer.

    Control tokens are those the template writes. A message that spells one out is refused: it could otherwise end its
    own turn, or begin one of another role.

    Args:
        tokenizer: a tokenizer.json.
        template: writes conversations as text.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: ChatTemplate) -> None:
        """Load the library that tells which characters each token stands for."""
        from tokenizers import Tokenizer

        description = json.loads(tokenizer.text)
        specials = [entry["content"] for entry in description.get("added_tokens") or () if entry.get("special")]
        # It only adds special tokens, which the template writes, and takes white space off the tokens' places.
        description["post_processor"] = None
        self._library = Tokenizer.from_str(json.dumps(description))
        self._library.no_truncation()
        self._library.no_padding()
        self._specials, self._template = specials, template
        self._end = tokenizer.end_of_document

    def encode(self, conversations: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]) -> list[Encoded | DataError]:
        """Each conversation, messages and further variables, as ids, or why it is none."""
        found: list[Any] = []
        for messages, others in conversations:
            try:
                self._refuse_specials(messages)
                found.append(self._template.render(messages, others))
            except DataError as error:
                found.append(error)
        texts = [rendering.text for rendering in found if not isinstance(rendering, DataError)]
        encodings = iter(self._library.encode_batch(texts, add_special_tokens=False))
        return [
            rendering if isinstance(rendering, DataError) else self._masked(rendering, next(encodings))
            for rendering in found
        ]

    def prompt(self, messages: list[dict[str, Any]], others: dict[str, Any] | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant's next turn begins; arguments as for the template's.

        Raises:
            DataError: the template refuses the conversation, or a message spells out a control token.
        """
        self._refuse_specials(messages)
        return self._library.encode(self._template.prompt(messages, others), add_special_tokens=False).ids

    def turn_end(self) -> TurnEnd:
        """How the template ends what the assistant says."""
        answer = "4f2a9c"
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
        tail = self._template.render(messages).text.rpartition(answer)[2].strip()
        ids = self._library.encode(tail, add_special_tokens=False).ids
        if ids and self._library.id_to_token(ids[0]) in self._specials:
            return TurnEnd(ids[0], "")
        return TurnEnd(None, tail)

    def without_specials(self, text: str) -> str:
        """``text`` without the control tokens that it spells out."""
        for special in self._specials:
            text = text.replace(special, "")
        return text

    def _masked(self, rendering: Any, encoding: Any) -> Encoded:
        """A token counts if all its characters are the assistant's."""
        text, spans = rendering
        inside = np.zeros(len(text) + 1, np.int64)
        for begin, end in spans:
            inside[begin:end] = 1
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        covered = np.diff(np.concatenate([[0], np.cumsum(inside)])[places], axis=1)[:, 0]
        widths = places[:, 1] - places[:, 0]
        # A token of no character, such as a blank put in front, goes with the character behind it.
        mask = np.where(widths > 0, covered == widths, inside[places[:, 0]] == 1)
        ids = np.array(encoding.ids, np.uint32)
        if not len(ids) or ids[-1] != self._end:
            ids, mask = np.append(ids, np.uint32(self._end)), np.append(mask, False)
        cut = int(((covered > 0) & (covered < widths)).sum())
        return Encoded(ids, mask.astype(np.uint8), len(text.encode()), cut)

    def _refuse_specials(self, messages: list[dict[str, Any]]) -> None:
        for text in strings(messages):
            for special in self._specials:
                if special in text:
                    raise DataError(f"a message contains the control token {special!r}")
