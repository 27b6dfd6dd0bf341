"""What modalities-core registers."""

COMPONENTS: dict[str, str] = {}
