"""The modalities command: train, check, generate and prepare data from one YAML document."""
