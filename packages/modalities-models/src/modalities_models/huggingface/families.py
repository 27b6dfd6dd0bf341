"""The families of Hugging Face models that our decoder can be read from and written as."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from modalities_core.errors import CheckpointError, ConfigError, ModalitiesError
from modalities_core.spelling import did_you_mean
from modalities_models.architecture import Architecture
from modalities_models.huggingface import dense, experts, gemma, gpt
from modalities_models.huggingface.family import Family
from modalities_models.huggingface.settings import Settings
from modalities_models.nn.mixture_of_experts import MixtureOfExperts

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            dense.LLAMA,
            gpt.GPT2,
            dense.QWEN2,
            dense.QWEN3,
            dense.MISTRAL,
            dense.MINISTRAL,
            dense.OLMO2,
            dense.OLMO3,
            gemma.GEMMA,
            gemma.GEMMA2,
            gemma.VAULTGEMMA,
            gpt.STARCODER2,
            dense.GRANITE,
            dense.SEED_OSS,
            dense.ARCEE,
            dense.PHI3,
            experts.MIXTRAL,
            experts.QWEN3_MOE,
            experts.QWEN2_MOE,
            experts.OLMOE,
            experts.DOTS1,
            experts.GLM4_MOE,
        )
    }
)
"""By ``model_type``, in the order in which they are tried: the most widely supported first."""

EXPERTS_HINT = (
    "a mixture of experts goes out with balance_rate 0 (Mixtral, Qwen), or with score sigmoid, a balance_rate and "
    "shared experts a whole number of times as wide as one expert (GLM-4-MoE)"
)


def family_of(architecture: Architecture) -> Family:
    """The first family that can express a decoder exactly.

    Raises:
        ConfigError: none can; it names the family that comes nearest and what it has no way to say.
    """
    differences: dict[Family, list[str]] = {}
    for family in FAMILIES.values():
        try:
            differences[family] = family.differences(architecture)
        except ModalitiesError:
            continue
        if not differences[family]:
            return family
    nearest = min(differences, key=lambda family: len(differences[family]))
    raise ConfigError(
        f"no stock class of transformers computes what this decoder does; the nearest is {nearest.class_name}, "
        f"which cannot have {', nor '.join(differences[nearest])}",
        hint=EXPERTS_HINT if isinstance(architecture.feedforward, MixtureOfExperts) else "",
    )


def family_named(name: str, architecture: Architecture | None = None) -> Family:
    """The family of this ``model_type``.

    Args:
        name: as in config.json.
        architecture: a decoder that it has to be able to express.

    Raises:
        ConfigError: there is no such family, or it cannot express the decoder.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"there is no family `{name}`{did_you_mean(name, FAMILIES)}", hint=f"families: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    if architecture is not None:
        try:
            differences = family.differences(architecture)
        except ModalitiesError as error:
            raise ConfigError(f"{family.class_name} cannot express this decoder: {error.message}") from error
        if differences:
            raise ConfigError(f"{family.class_name} cannot have {', nor '.join(differences)}")
    return family


def family_in(settings: Settings) -> Family:
    """The family that a config.json says it is of.

    Raises:
        CheckpointError: it does not say, or of none that can be read.
    """
    name = settings.take("model_type", str)
    if name not in FAMILIES:
        raise CheckpointError(
            f"{settings.source}: models of type `{name}` cannot be imported{did_you_mean(name, FAMILIES)}",
            hint=f"families: {', '.join(FAMILIES)}; component model.huggingface trains any model of transformers as "
            "it is",
        )
    return FAMILIES[name]


def read_architecture(settings: Settings) -> tuple[Family, Architecture]:
    """The family and the decoder that a config.json describes.

    Raises:
        CheckpointError: a setting is missing, unknown, or one that our decoder cannot follow.
    """
    family = family_in(settings)
    try:
        architecture = family.read(settings)
    except ConfigError as error:
        raise CheckpointError(f"{settings.source}: {error.message}", hint=error.hint) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{settings.source} is no config.json of a {family.class_name} ({kind})") from error
    settings.finish()
    return family, architecture
