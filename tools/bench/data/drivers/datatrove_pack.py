"""JSONL to tokens with datatrove's DocumentTokenizer: SOURCE_FOLDER OUTPUT TOKENIZER END WORKERS."""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(source: str, output: str, tokenizer_json: str, end_of_document: str, workers: str) -> None:
    tokenize = DocumentTokenizer(
        f"{output}/tokens", tokenizer_name_or_path=tokenizer_json, eos_token=end_of_document, shuffle_documents=False
    )
    LocalPipelineExecutor(
        pipeline=[JsonlReader(source), tokenize],
        tasks=int(workers),
        workers=int(workers),
        logging_dir=f"{output}/logs",
    ).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
