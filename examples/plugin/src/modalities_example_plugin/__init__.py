"""A plugin for Modalities: names to where they can be imported from."""

COMPONENTS = {
    "model.cosine_decoder": "modalities_example_plugin.model:CosineDecoder",
    "schedule.inverse_square_root": "modalities_example_plugin.schedule:InverseSquareRoot",
}
