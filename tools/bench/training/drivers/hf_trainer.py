"""transformers' Trainer with its own Llama: SPEC. fp32 is its default; bf16 and compile are its own switches."""

import tempfile

import numpy as np
import torch
from clock import Clock, parameters, spec
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging


class Windows(torch.utils.data.Dataset):
    """The token file cut into samples."""

    def __init__(self, wanted):
        self.data = np.memmap(f"{wanted['data']}/00000.bin", wanted["dtype"], "r")
        self.length = wanted["shape"]["sequence_length"]

    def __len__(self):
        return len(self.data) // self.length

    def __getitem__(self, index):
        tokens = torch.from_numpy(self.data[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


class Watch(TrainerCallback):
    def __init__(self, clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.clock.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.clock.losses[state.global_step] = float(logs["loss"])


def main():
    wanted = spec()
    shape, clock = wanted["shape"], Clock(wanted)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], num_hidden_layers=shape["layers"],
        intermediate_size=shape["intermediate_size"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_value_heads"], max_position_embeddings=shape["sequence_length"],
        rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
    ))  # fmt: skip
    pure = wanted["weights"] == "bf16"
    if pure:
        model.bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=wanted["warmup"] + wanted["steps"], learning_rate=wanted["lr"],
            per_device_train_batch_size=wanted["micro_batch_size"],
            gradient_accumulation_steps=wanted["samples_per_step"] // wanted["micro_batch_size"],
            use_cpu=wanted["device"] == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            logging_first_step=True, logging_steps=wanted["log_every"], bf16=wanted["precision"] == "bf16" and not pure,
            torch_compile=wanted["compile"], dataloader_pin_memory=wanted["device"] == "cuda",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=Windows(wanted), callbacks=[Watch(clock)]).train()
    clock.tell(parameters=parameters(model))


if __name__ == "__main__":
    main()
