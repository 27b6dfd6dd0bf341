"""A model's blocks in stages, on ranks that pass hidden states on."""
