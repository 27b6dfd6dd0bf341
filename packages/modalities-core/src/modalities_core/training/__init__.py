"""The training loop and what it needs; the part of the core that uses torch."""
