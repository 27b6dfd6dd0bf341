"""From datasets to batches of torch tensors: the only part of modalities-data that needs torch."""
