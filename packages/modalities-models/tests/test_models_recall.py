"""Recall at k of images and texts."""

from __future__ import annotations

import torch

from modalities_models.captions import recall


def test_recall_counts_both_ways_and_ties_against_us():
    images = torch.eye(4)
    assert recall(images, torch.eye(4)) == (1.0, 1.0)
    swapped = torch.eye(4)[[1, 0, 2, 3]]
    assert recall(images, swapped) == (0.5, 0.5)
    assert recall(images, swapped, k=4) == (1.0, 1.0)
    assert recall(torch.ones(4, 1), torch.ones(4, 1)) == (0.0, 0.0)
    one_text = torch.stack([torch.eye(4)[0]] * 4) + 0.1 * torch.eye(4)
    assert recall(images, one_text).image_of_text == 0.25
