"""Packed folders from and to what other programs write."""
