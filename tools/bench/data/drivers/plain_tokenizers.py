"""JSONL to raw tokens with nothing but ``tokenizers``: SOURCE OUTPUT TOKENIZER END. Prints what encoding alone took."""

import itertools
import json
import sys
import time

import msgspec
import numpy as np
from tokenizers import Tokenizer

# A thousand take a few hundredths longer, and 1.8 times the memory.
DOCUMENTS = 100


def main(source: str, output: str, tokenizer_json: str, end_of_document: str) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_json)
    end = tokenizer.token_to_id(end_of_document)
    decode = msgspec.json.Decoder(msgspec.defstruct("Document", [("text", str)])).decode
    encoding = 0.0
    with open(source, "rb") as lines, open(output, "wb") as tokens:
        while batch := [decode(line).text for line in itertools.islice(lines, DOCUMENTS)]:
            before = time.process_time()
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            encoding += time.process_time() - before
            for one in encoded:
                tokens.write(np.array([*one.ids, end], "<u2").data)
    print(json.dumps({"encode_cpu": encoding}))


if __name__ == "__main__":
    main(*sys.argv[1:])
