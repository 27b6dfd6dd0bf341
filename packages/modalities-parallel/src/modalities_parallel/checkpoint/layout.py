"""What a checkpoint says of its tensors."""

Layout = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name to global shape and dtype, as ``((61, 16), "float32")``."""
