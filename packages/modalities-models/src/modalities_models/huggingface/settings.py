"""A config.json read key by key, so that what nobody has read, and what might change the model, can be refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modalities_core.errors import CheckpointError

FILE_NAME = "config.json"
log = logging.getLogger("modalities")

_HARMLESS = """
    _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path _num_labels add_cross_attention
    architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range keys_to_ignore_at_inference label2id length_penalty max_length
    min_length model_max_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout n_ctx
    reorder_and_upcast_attn mlp_jitter router_jitter_noise hidden_size_per_head initializer_factor cache_implementation
    _flash_attn_2_enabled gradient_checkpointing is_llama_config max_sequence_length
    neftune_noise_alpha num_logits_to_keep
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that do not change what the model computes from tokens, at least not outside of training by others' code."""

OFF_WHEN = {
    "is_decoder": (False, True),
    **dict.fromkeys(
        ("attention_bias", "is_encoder_decoder", "mlp_bias", "qkv_bias", "use_bidirectional_attention", "use_mrope"),
        (False,),
    ),
    **dict.fromkeys(("qk_layernorm", "rope_interleaved", "use_qk_norm", "use_sliding_window"), (False,)),
}
"""Keys that some families do not read, with the values that change nothing."""

LARGEST = 2**31
_MISSING = object()


class Settings:
    """The keys of one config.json; whoever takes one vouches for it.

    Args:
        values: the file's content.
        source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self.values = dict(values)
        self.source = source
        self._taken: set[str] = set()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The value of ``key``, checked; ``default`` where it is missing or null.

        Raises:
            CheckpointError: it is missing and has no default, or of another type.
        """
        self._taken.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.source} does not say `{key}`, which a model of its kind needs")
            return default
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if float in wanted and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise CheckpointError(f"{self.source}: `{key}` is {value!r}, which is no {wanted[0].__name__}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise CheckpointError(f"{self.source}: `{key}` is {value}, which no model has")
        return value

    def require(self, key: str, expected: Any, default: Any = _MISSING) -> None:
        """Make sure that ``key``, or its default, has the one value, or one of a tuple, that can be expressed.

        Raises:
            CheckpointError: it has another.
        """
        self._taken.add(key)
        value = self.values.get(key)
        value = expected if value is None and default is _MISSING else default if value is None else value
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if value not in allowed:
            words = " or ".join(json.dumps(item) for item in allowed)
            raise self.refusal(key, f"Modalities has it only as {words}", value)

    def training_only(self, key: str, expected: float = 0.0) -> None:
        """Take note of a key that matters in training only, and say that its value is not taken over."""
        self._taken.add(key)
        value = self.values.get(key)
        if value is not None and value != expected:
            log.warning("%s: %s %s is not taken over; what it does concerns training only", self.source, key, value)

    def refusal(self, key: str, why: str, value: Any = _MISSING) -> CheckpointError:
        """The error about a setting that our decoder cannot follow."""
        value = self.values.get(key) if value is _MISSING else value
        return CheckpointError(
            f"{self.source}: `{key}: {json.dumps(value)}` cannot be imported: {why}",
            hint="component model.huggingface trains any model of transformers as it is",
        )

    def finish(self) -> None:
        """Make sure that nothing is left that may change the model.

        Raises:
            CheckpointError: naming the keys.
        """
        if "quantization_config" in self.values:
            raise CheckpointError(
                f"{self.source} says that the weights are quantized", hint="import the weights before quantization"
            )
        if self.values.get("auto_map"):
            log.warning("%s names code of its own (auto_map); it is ignored, no such code is ever run", self.source)
        unknown = {
            key: value
            for key, value in self.values.items()
            if key not in self._taken and key not in HARMLESS and key != "auto_map" and value is not None
        }
        for key, values in OFF_WHEN.items():
            if unknown.get(key, _MISSING) in values:
                del unknown[key]
        if unknown:
            named = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in sorted(unknown.items()))
            raise CheckpointError(
                f"{self.source} has settings that Modalities does not know for {self.values.get('model_type')}: "
                f"{named}",
                hint="each may change what the model computes; delete those that do not from a copy of the file",
            )


def read_settings(folder: Path) -> Settings:
    """The settings in ``folder/config.json``.

    Raises:
        CheckpointError: there is no such file, or it is no JSON object.
    """
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a Hugging Face checkpoint: it has no {FILE_NAME}",
            hint="it has to be a folder on this machine, for example one that `hf download NAME --local-dir DIR` made",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return Settings(values, path)
