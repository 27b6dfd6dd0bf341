"""What this package adds to the config language: names only, nothing is imported until it is used."""

COMPONENTS: dict[str, str] = {
    "model.decoder": "modalities_models.decoder:decoder",
    "initialization.plain": "modalities_models.initialization:Plain",
    "initialization.scaled": "modalities_models.initialization:Scaled",
    "initialization.llama": "modalities_models.initialization:Llama",
    "loss.cross_entropy": "modalities_models.losses:CrossEntropy",
}
