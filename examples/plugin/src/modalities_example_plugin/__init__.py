"""A plugin for Modalities: names to where they can be imported from."""

COMPONENTS = {"schedule.inverse_square_root": "modalities_example_plugin.schedule:InverseSquareRoot"}
