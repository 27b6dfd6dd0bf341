"""Decoder models, initialisation, losses and generation of Modalities."""
