"""The component ``model.huggingface``: any causal language model of transformers, trained as it is.

Shape suffixes: B batch, T tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_models.huggingface import wrapped_counts
from modalities_models.huggingface.construction import Construction
from modalities_models.huggingface.verifying import Agreement
from modalities_models.huggingface.wrapped_config import Description, describe
from modalities_models.huggingface.wrapped_export import compare, export
from modalities_models.huggingface.wrapped_head import base_name, head_of
from modalities_models.huggingface.wrapped_plan import wrapped_plan
from modalities_models.huggingface.wrapped_ties import replace_ties
from modalities_models.huggingface.wrapped_weights import FolderWeights
from modalities_models.nn.masks import positions

NETWORK = "network."
_KEEPS_DOCUMENTS = """
    apertus arcee bitnet cohere cohere2 cwm ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4
    glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense jais2 llama
    minimax_m2 ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe phi phi3 phimoe qwen2
    qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma
"""
KEEPS_DOCUMENTS = frozenset(_KEEPS_DOCUMENTS.split())
"""Types whose classes keep documents apart by their positions alone, from transformers 5.0 on; each is tested."""


class HuggingFaceModel(nn.Module):
    """A causal language model of transformers; satisfies ``modalities_core.interfaces.Model``.

    Its parameters have the class's own names behind ``network.``. Tied weights are one parameter, under the name of
    the embedding. Inside ``torch.device("meta")`` nothing is initialised; anywhere else the constructor fills
    everything from ``initial_values``.

    Args:
        description: class, config and, where weights are to be read, their folder.
        sequence_length: the longest input.
        seed: of the random streams.

    Raises:
        ConfigError: the class cannot be wrapped; it says why.
        CheckpointError: the folder's weights are missing or of other shapes.
    """

    def __init__(self, description: Description, sequence_length: int, seed: int) -> None:
        super().__init__()
        self.description = description
        self.sequence_length = sequence_length
        self.seed = seed
        device = torch.get_default_device()
        ties: list[str] = []

        def build() -> nn.Module:
            network: Any = description.build()
            network.tie_weights()  # some versions leave that out where there is no memory
            ties.extend(replace_ties(network))
            network.initialize_weights()
            return network

        # Always built without storage, so that no process holds all of it, and every process has the same values.
        self._construction = Construction(build)
        self.network = self._construction.module
        network: Any = self.network
        self._tied = frozenset(ties)
        self._base = base_name(self.network)
        with torch.device("meta"):
            # In a tuple, where nn.Module does not look: its weights are the network's.
            self._head = (head_of(self.network),)
        outputs: Any = network.get_output_embeddings()
        self.vocab_size: int = min(outputs.weight.shape[0], network.get_input_embeddings().weight.shape[0])
        # Counted now, while all parameters are whole.
        self._matmul = wrapped_counts.matmul_parameters(self.network, description.config, outputs)
        self._weights = None
        if description.weights is not None:
            self._weights = FolderWeights(description.weights, self.network, self._tied)
        if device.type != "meta":
            self.to_empty(device=device)
            self._initialise()

    @property
    def head(self) -> nn.Module:
        """Hidden states (..., D) to logits (..., V), as the class computes them."""
        return self._head[0]

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Token ids (B, T) int64 to what the base model gives, (B, T, D).

        Args:
            tokens_BT: the ids.
            segments_BT: (B, T) integers, the number of each token's document within its sample; tokens then see only
                their own document, and positions count from its start.

        Raises:
            ConfigError: the input is longer than the model's sequence length, or the class is not known to keep
                documents apart.
        """
        if tokens_BT.shape[1] > self.sequence_length:
            raise ConfigError(
                f"an input of {tokens_BT.shape[1]} tokens is longer than sequence_length {self.sequence_length}",
                about=(self, "sequence_length"),
            )
        apart = {}
        if segments_BT is not None:
            self._refuse_documents()
            apart = {"position_ids": positions(tokens_BT, segments_BT=segments_BT)}
        base = getattr(self.network, self._base)
        return base(input_ids=tokens_BT, use_cache=False, return_dict=True, **apart)[0]

    def parallel_plan(self) -> ParallelPlan:
        """Blocks, and for tensor parallelism what the class's own plan splits; see ``wrapped_plan``."""
        return wrapped_plan(self.network, self._base, NETWORK)

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name and whole initial value on the CPU; the same on every rank."""
        given: set[str] = set()
        if self._weights is not None:
            for name, value in self._weights.values():
                given.add(name)
                yield NETWORK + name, value
        for name, value in self._construction.values(self.seed, frozenset(given)):
            yield NETWORK + name, value

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token, forward and backward (PaLM convention, arXiv:2204.02311 appendix B).

        Of experts only those that a token passes through are counted.
        """
        return 6.0 * self._matmul + wrapped_counts.attention_flops(self.description.config, sequence_length)

    def causal_flops_per_token(self, sequence_length: int) -> float:
        """The same with the share of the attention that causality leaves over (Megatron-LM's convention)."""
        attention = wrapped_counts.attention_flops(self.description.config, sequence_length, "causal")
        return 6.0 * self._matmul + attention

    def export(
        self,
        folder: Path,
        read: Callable[[str], Tensor],
        *,
        dtype: torch.dtype | None = None,
        stored: Callable[[str], torch.dtype] | None = None,
        token_ids: Mapping[str, int | list[int]] | None = None,
    ) -> str:
        """Write the model into an existing, empty folder as its class does; all of it is in memory for that time.

        Args:
            folder: where to.
            read: gives the whole tensor of one of our names.
            dtype: of the weights written; by default as they are stored.
            stored: not needed: whole tensors say their type.
            token_ids: such as ``eos_token_id``, for config.json and generation_config.json.

        Returns:
            The name of the class.
        """
        return export(self.description, folder, self._read_all(read), self._tied, dtype, token_ids or {})

    def compare(self, folder: Path, read: Callable[[str], Tensor]) -> Agreement:
        """Compare what was exported with these tensors: every value, and the logits of the class loaded from there.

        Raises:
            CheckpointError: something was lost.
        """
        return compare(self, folder, self._read_all(read))

    def _read_all(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {name: read(NETWORK + name).detach().cpu() for name in self.network.state_dict()}

    def _refuse_documents(self) -> None:
        kind = self.description.config.model_type
        if kind not in KEEPS_DOCUMENTS:
            raise ConfigError(
                f"the data marks where documents begin, but {self.description.class_name} is not known to keep them "
                "apart",
                hint=f"let the dataset join documents, or take one of {', '.join(sorted(KEEPS_DOCUMENTS))}",
                about=self,
            )

    @torch.no_grad()
    def _initialise(self) -> None:
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, value in self.initial_values():
            tensors[name].copy_(value)


def huggingface(
    path: Path | None = None,
    model_type: str | None = None,
    config: dict[str, Any] | None = None,
    weights: Literal["pretrained", "random"] | None = None,
    sequence_length: int | None = None,
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto",
    seed: int = 0,
) -> HuggingFaceModel:
    """Any causal language model of the transformers library, as its own class computes it; needs the extra.

    Give either a folder or a model_type. Nothing is ever downloaded, and no code that comes with weights is run.
    Auxiliary losses that a class adds to its own loss, such as those that balance experts, are not added here. It
    takes transformers 5 or later.

    Args:
        path: a folder of Hugging Face's on this machine with config.json and, unless weights is random, safetensors.
        model_type: instead of a folder, the name of a family as in config.json, such as llama or qwen3.
        config: values in place of those in config.json, or of the family's defaults.
        weights: pretrained reads those of the folder, the default where there is one; random draws them as the class
            does.
        sequence_length: longest input in tokens; default max_position_embeddings, and at most that.
        attention: the implementation in transformers; auto is the class's own choice.
        seed: of random weights.

    Raises:
        ConfigError: transformers is not installed or too old, the family or a key of config is unknown, or the class is
            none that can be trained as a language model here.
        CheckpointError: there is no such folder, or its weights are pickles, missing, damaged or of other shapes.
    """
    description = describe(path, model_type, config or {}, weights, attention)
    longest = description.longest
    if sequence_length is None and longest is None:
        raise ConfigError(
            f"the config of {description.class_name} does not say how long an input may be",
            hint="give sequence_length",
        )
    if sequence_length is not None and (sequence_length < 1 or (longest is not None and sequence_length > longest)):
        raise ConfigError(
            f"sequence_length is {sequence_length}, but the config of {description.class_name} allows 1 to {longest}",
            hint="config: {max_position_embeddings: ...} changes that",
            about=(huggingface, "sequence_length"),
        )
    length = longest if sequence_length is None else sequence_length
    assert length is not None
    return HuggingFaceModel(description, length, seed)
