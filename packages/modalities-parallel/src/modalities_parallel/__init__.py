"""World, mesh, sharding and committed distributed checkpoints of Modalities."""
