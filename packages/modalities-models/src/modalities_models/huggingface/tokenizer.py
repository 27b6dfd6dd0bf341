"""The tokenizer of an export, as ``transformers.AutoTokenizer`` reads it.

Every document a run is trained on follows an end-of-document token, so an exported tokenizer puts one in front of
every text, as others put a beginning-of-sequence token there: whoever evaluates or serves the model then asks it
what it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
KEPT = ("pad_token", "unk_token", "additional_special_tokens")
FILES = (
    TOKENIZER,
    CONFIG,
    SPECIALS,
    TEMPLATE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "generation_config.json",
)
"""What a folder of Hugging Face's may hold beside config.json and the weights; nothing of it is code."""


def write_tokenizer(
    folder: Path,
    content: str,
    end_token: str,
    end_id: int,
    longest: int,
    template: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, int | list[int]]:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, the chat template.

    Args:
        folder: where to.
        content: of the run's tokenizer.json.
        end_token: what is written after, and so before, every document.
        end_id: its id.
        longest: the model's sequence length.
        template: the chat template.
        settings: of the tokenizer_config.json that the run's tokenizer came with; its special tokens are kept where
            a chat template may name them.

    Returns:
        ``bos_token_id`` and ``eos_token_id`` for config.json and generation_config.json.
    """
    kept = KEPT if template is None else (*KEPT, "bos_token", "eos_token")
    found = {key: value for key, value in (settings or {}).items() if key in kept and value}
    specials = {"bos_token": end_token, "eos_token": end_token, **found}
    config = {
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / TOKENIZER).write_text(with_start(content, end_token, end_id), encoding="utf-8")
    _write(folder / CONFIG, config)
    _write(folder / SPECIALS, specials)
    if template is not None:
        starts = "bos_token" in template and _text(specials["bos_token"]) == end_token
        # As every document does, a conversation follows the end of another.
        start = "" if starts else "{{ " + json.dumps(end_token) + " }}"
        (folder / TEMPLATE).write_text(start + template, encoding="utf-8")
    turn_end = special_id(content, _text(specials["eos_token"]))
    ends = sorted({end_id} | ({turn_end} if turn_end is not None else set()))
    return {"bos_token_id": end_id, "eos_token_id": ends if len(ends) > 1 else end_id}


def special_id(content: str, token: str) -> int | None:
    """The id of an added token of a tokenizer.json, or None if there is none of that text."""
    added = json.loads(content).get("added_tokens") or ()
    return next((entry["id"] for entry in added if entry["content"] == token), None)


def with_start(content: str, token: str, token_id: int) -> str:
    """A tokenizer.json that writes ``token`` before every text, and no other token before or after it."""
    description = json.loads(content)
    piece: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    start = {
        "type": "TemplateProcessing",
        "single": [piece, first],
        "pair": [piece, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
    before = description.get("post_processor")
    steps = before["processors"] if before and before["type"] == "Sequence" else [before] if before else []
    # These only say where a piece lies in the text; all other kinds write tokens.
    steps = [step for step in steps if step["type"] == "ByteLevel"]
    description["post_processor"] = {"type": "Sequence", "processors": [*steps, start]} if steps else start
    return json.dumps(description, ensure_ascii=False)


def byte_tokenizer(end_token: str, end_id: int) -> str:
    """A tokenizer.json whose ids are the bytes of a text in UTF-8.

    Args:
        end_token: how the end of a document is written.
        end_id: its id.
    """
    # The alphabet that byte-level tokenizers write bytes in: printable ones as they are, others from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": end_id, "content": end_token, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": dict(sorted(vocabulary.items(), key=lambda entry: entry[1])), "merges": []},
    }
    return json.dumps(description, ensure_ascii=False)


def _text(token: Any) -> str:
    """A special token as text; some files describe it by a mapping."""
    return token["content"] if isinstance(token, dict) else str(token)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
