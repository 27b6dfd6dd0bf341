"""Interfaces, configuration graph, events and the training loop of Modalities."""
