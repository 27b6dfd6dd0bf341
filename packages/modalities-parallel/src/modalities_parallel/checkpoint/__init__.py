"""The sharded checkpoint format: torch.distributed.checkpoint without its blind spots."""
