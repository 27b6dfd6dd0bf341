"""What this package adds to the config language: names only, nothing is imported until it is used."""

COMPONENTS: dict[str, str] = {
    "model.decoder": "modalities_models.decoder:decoder",
    "model.pretrained": "modalities_models.huggingface.pretrained:pretrained",
    "model.huggingface": "modalities_models.huggingface.wrapped:huggingface",
    "model.vision_transformer": "modalities_models.vision:VisionTransformer",
    "model.coca": "modalities_models.coca:CoCa",
    "initialization.plain": "modalities_models.initialization:Plain",
    "initialization.scaled": "modalities_models.initialization:Scaled",
    "initialization.llama": "modalities_models.initialization:Llama",
    "initialization.pretrained": "modalities_models.huggingface.pretrained:Pretrained",
    "rope_scaling.linear": "modalities_models.nn.rope_scaling:Linear",
    "rope_scaling.ntk": "modalities_models.nn.rope_scaling:Ntk",
    "rope_scaling.yarn": "modalities_models.nn.rope_scaling:Yarn",
    "rope_scaling.llama3": "modalities_models.nn.rope_scaling:Llama3",
    "feedforward.mixture_of_experts": "modalities_models.nn.mixture_of_experts:MixtureOfExperts",
    "loss.cross_entropy": "modalities_models.losses:CrossEntropy",
    "loss.liger_cross_entropy": "modalities_models.losses:LigerCrossEntropy",
    "loss.coca": "modalities_models.losses.coca:CoCaLoss",
    "generation.text": "modalities_models.generation.samples:text",
}
