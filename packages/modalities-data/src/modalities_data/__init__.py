"""Text to packed, checksummed token datasets and exact sample order, without torch."""
