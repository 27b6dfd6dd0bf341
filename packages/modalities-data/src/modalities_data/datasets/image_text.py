"""Pairs of an image and its caption, for models that look at images.

Shape suffixes: N samples, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Samples, Tokenizer
from modalities_data.datasets.arrays import check_length, checked, fingerprint
from modalities_data.image_text import CHECKED_WHEN_OPENED, open_images, read_captions, read_manifest, verify

LongCaptions = Literal["refuse", "cut"]


class ImageTextDataset:
    """One sample per caption of a folder of images: the caption between two end-of-document tokens, and its image.

    A caption of n tokens gives the inputs ``end, caption`` and the targets ``caption, end``, n + 1 of each. The rest of
    the T inputs is padding: end-of-document tokens of weight 0, marked as a segment of their own, so that a summary of
    the whole caption can leave them out. Images stay on disk and are mapped; captions are tokenized at the start. Up to
    128 MB of images are checked at the start; ``modalities-data verify`` checks any folder.

    Args:
        path: the folder, as ``modalities-data image-text`` makes it.
        tokenizer: turns captions into tokens.
        sequence_length: target tokens per sample, those of the longest caption and one more.
        long_captions: ``refuse`` those that are longer, or ``cut`` them and end them there.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None
    image_shape: tuple[int, int, int]

    def __init__(
        self, path: Path, tokenizer: Tokenizer, sequence_length: int, long_captions: LongCaptions = "refuse"
    ) -> None:
        """Open the folder and tokenize its captions.

        Raises:
            ConfigError: the sequence length is not positive, or ``long_captions`` is neither of its choices.
            DataError: the folder is damaged, or a caption is longer than the sequence and not to be cut.
        """
        check_length(self, sequence_length)
        if long_captions not in get_args(LongCaptions):
            choices = " or ".join(get_args(LongCaptions))
            raise ConfigError(f"long_captions is {choices}, not {long_captions!r}", about=(self, "long_captions"))
        folder = Path(path)
        manifest = read_manifest(folder)
        captions = read_captions(folder, manifest)
        if manifest.bytes <= CHECKED_WHEN_OPENED:
            verify(folder, manifest)
        self._images = open_images(folder, manifest)
        self._image_of = np.array([caption.image for caption in captions], np.int64)
        self._ids, self._offsets = tokenizer.encode_flat([caption.text for caption in captions])
        self._end = tokenizer.end_of_document
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        longest = int(np.diff(self._offsets).max())
        if longest >= sequence_length and long_captions == "refuse":
            raise DataError(
                f"{folder}: the longest caption has {longest} tokens, and one more ends it; sequence_length is "
                f"{sequence_length}",
                hint=f"set sequence_length to {longest + 1}, or long_captions to cut",
                about=(self, "sequence_length"),
            )
        self.sequence_length = sequence_length
        self.largest_id = max(int(self._ids.max(initial=0)), self._end)
        # The loss of a model that looks at images is no mere cross entropy of the text.
        self.bytes_per_token = None
        self.image_shape = manifest.shape
        content = f"{manifest.fingerprint} {tokenizer.fingerprint} {self._end}"
        self.fingerprint = fingerprint("image text", content, sequence_length)

    def __len__(self) -> int:
        """How many captions there are."""
        return len(self._image_of)

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1), weights, segments and images.

        Raises:
            IndexError: an index is not in [0, len).
        """
        indices = checked(indices, len(self))
        length = self.sequence_length
        starts = self._offsets[indices]
        counts_N1 = np.minimum(self._offsets[indices + 1] - starts, length - 1)[:, None]
        places_T = np.arange(length)
        tokens = np.full((len(indices), length + 1), self._end, self._dtype)
        if len(self._ids):
            of_caption = np.minimum(starts[:, None] + places_T, len(self._ids) - 1)
            tokens[:, 1:] = np.where(places_T < counts_N1, self._ids[of_caption], self._end)
        padding = places_T > counts_N1
        images = np.asarray(self._images[self._image_of[indices]])
        return Samples(tokens, (~padding).astype(np.float32), padding.astype(np.int32), images)
