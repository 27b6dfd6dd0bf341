"""What modalities-data registers: names of the config language and where their code is; importing nothing."""

from __future__ import annotations

COMPONENTS: dict[str, str] = {
    "batch_size.linear": "modalities_data.batch_sizes:Linear",
    "batch_size.stages": "modalities_data.batch_sizes:Stages",
    "batches.held_out": "modalities_data.loading.batches:HeldOutBatches",
    "batches.in_order": "modalities_data.loading.batches:InOrderBatches",
    "batches.shuffled": "modalities_data.loading.batches:ShuffledBatches",
    "dataset.best_fit": "modalities_data.datasets.best_fit:BestFitDataset",
    "dataset.image_text": "modalities_data.datasets.image_text:ImageTextDataset",
    "dataset.lorem_ipsum": "modalities_data.datasets.memory:LoremIpsumDataset",
    "dataset.mixture": "modalities_data.datasets.mixture:MixtureDataset",
    "dataset.packed": "modalities_data.datasets.packed:PackedDataset",
    "dataset.part": "modalities_data.datasets.part:PartDataset",
    "tokenizer.bytes": "modalities_data.tokenizers.bytes:BytesTokenizer",
    "tokenizer.huggingface": "modalities_data.tokenizers.huggingface:HuggingFaceTokenizer",
    "tokenizer.sentencepiece": "modalities_data.tokenizers.sentencepiece:SentencePieceTokenizer",
    "tokenizer.tiktoken": "modalities_data.tokenizers.tiktoken:TiktokenTokenizer",
}
