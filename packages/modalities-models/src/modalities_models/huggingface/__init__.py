"""Reading and writing Hugging Face checkpoints without the ``transformers`` library: config.json and safetensors."""
