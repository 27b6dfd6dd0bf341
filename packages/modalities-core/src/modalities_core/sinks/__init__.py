"""Consumers of a run's events."""
