"""The config language: one YAML document to a graph of built objects."""
