"""So that ``python -m modalities`` and ``torchrun -m modalities`` work; the code is in the modalities_* packages."""
