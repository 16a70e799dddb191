"""The composition of a drafter: settings, parts with their tensors, and `config.json` entries. Does not import torch.

`PARTS` is the single list of all parts other than the attention copies. It drives training, export, loading,
verification, the Hub check and the model card.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

ATTENTION_TUNING, BONUS_CALIBRATION = "attention_tuning", "bonus_calibration"  # training stages
# config.json stores the same settings under both keys: the public code reads the first, the published checkpoint uses
# the second.
FLEXDRAFT_KEYS = ("flexdraft_config", "dflash_config")
# Keys of the drafter settings in the public format.
IDS, ENABLED, RANK = "target_layer_ids", "enable_anchor_bias_logits", "anchor_bias_rank"
# Entries in config.json that identify the target, mapped to the attributes of the target's config.
IDENTITY = {
    "model_type": "model_type",
    "num_target_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
}
MINIMUM = {"num_layers": 1, "block_size": 2}  # slot 0 is never drafted, so a block needs at least two slots
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class DraftConfig:
    """Drafter settings, named as in `model.draft` in conf/. A value of False or 0 disables the corresponding part.

    Raises:
        ValueError: a value is out of range.
    """

    num_layers: int  # L, number of draft layers (the target's last layers)
    block_size: int  # B, number of mask tokens per block
    calibrator_rank: int  # r, hidden size of the calibrator
    bonus_slot: bool = False  # whether slot 0's input can encode a known bonus token
    chain_rank: int = 0  # hidden size of the chain, an MLP conditioned on the previously drafted token

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if expected := expectation(key, value):
                raise ValueError(f"{key}={value!r}: expected {expected}.")

    @classmethod
    def from_artifact(cls, config: Mapping[str, Any]) -> "DraftConfig":
        """Read the settings from an exported `config.json` in which `export.config.own_faults` finds no faults."""
        settings = draft_settings(config) or {}
        return cls(
            num_layers=len(settings[IDS]),
            block_size=config["block_size"],
            calibrator_rank=settings[RANK] if settings[ENABLED] else 0,
            **{key: settings.get(key, off) for key, off in EXTRAS.items()},
        )

    def settings(self, target_layers: int) -> dict[str, Any]:
        """Return the drafter settings for `config.json`. Disabled extensions are omitted, as in the public format."""
        return {
            IDS: list(range(max(0, target_layers - self.num_layers), target_layers)),
            ENABLED: self.calibrator_rank > 0,
            RANK: self.calibrator_rank,
            **{key: value for key in EXTRAS if (value := getattr(self, key))},
        }

    def parts(self, stage: str | None = None) -> list["Part"]:
        """Return the drafter's parts or, if `stage` is given, only those that the stage trains."""
        return [part for part in PARTS if stage in (None, part.stage) and (not part.key or getattr(self, part.key))]

    def tensors(self, hidden: int, vocabulary: int, stage: str | None = None) -> Shapes:
        """Return the shapes of all tensors in `parts(stage)`, by exported name.

        Args:
            hidden, vocabulary: the target's hidden size H and vocabulary size V.
            stage: as in `parts`.
        """
        found: Shapes = {}
        for part in self.parts(stage):
            found |= part.tensors(self, hidden, vocabulary)
        return found

    def names(self, stage: str | None = None) -> list[str]:
        """Return the exported names of all tensors in `parts(stage)`."""
        return list(self.tensors(1, 1, stage))

    def uncalibrated(self) -> "DraftConfig":
        """Return a copy of the settings with the parts trained in stage 2 disabled."""
        return replace(self, **{part.key: off for part, off in OPTIONAL if part.stage == BONUS_CALIBRATION})

    def without_extras(self) -> "DraftConfig":
        """Return a copy of the settings with the extensions beyond the paper disabled."""
        return replace(self, **EXTRAS)

    def described(self) -> str:
        """Describe the optional parts, e.g. `calibrator of rank 8, bonus slot, chain of rank 4`."""
        found = [(part, getattr(self, part.key)) for part in self.parts() if part.key]
        texts = [part.name if value is True else f"{part.name} of rank {value}" for part, value in found]
        return ", ".join(texts if self.calibrator_rank else ["no calibrator", *texts])


@dataclass(frozen=True)
class Part:
    """A trained part of the drafter, other than the attention copies."""

    key: str  # field of `DraftConfig` that enables it; empty if every drafter has it
    module: str  # attribute of `DraftModel` and prefix of the tensor names
    name: str  # used in messages
    stage: str  # stage that trains it
    tensors: Callable[[DraftConfig, int, int], Shapes]  # config, hidden size, vocabulary -> shapes by exported name
    beyond: str = ""  # for extensions beyond the paper: what the part does, for the model card

    @property
    def setting(self) -> str:
        """The part's key in `config.json`."""
        return self.key if self.beyond else ENABLED

    def owns(self, name: str) -> bool:
        """Return whether the tensor with this exported name belongs to the part."""
        return name.split(".")[0] == self.module


def _mlp(module: str, rank: int, hidden: int, vocabulary: int) -> Shapes:
    """Return the tensor shapes of the MLP `W2 SiLU(W1 [x ; h] + b1) + b2`."""
    first = {f"{module}.0.weight": (rank, 2 * hidden), f"{module}.0.bias": (rank,)}
    return {**first, f"{module}.2.weight": (vocabulary, rank), f"{module}.2.bias": (vocabulary,)}


PARTS = (
    Part("", "mask_embedding", "mask embedding", ATTENTION_TUNING, lambda _, hidden, __: {"mask_embedding": (hidden,)}),
    Part(
        "calibrator_rank",
        "anchor_bias_mlp",
        "calibrator",
        BONUS_CALIBRATION,
        lambda draft, *sizes: _mlp("anchor_bias_mlp", draft.calibrator_rank, *sizes),
    ),
    Part(
        "bonus_slot",
        "bonus_slot",
        "bonus slot",
        ATTENTION_TUNING,
        lambda _, hidden, __: {"bonus_slot.weight": (hidden, hidden)},
        beyond="slot 0 encodes the bonus token if it is known before drafting",
    ),
    Part(
        "chain_rank",
        "chain_mlp",
        "chain",
        BONUS_CALIBRATION,
        lambda draft, *sizes: _mlp("chain_mlp", draft.chain_rank, *sizes),
        beyond="each slot's logits depend on the previously drafted token",
    ),
)
KINDS = {field.name: field.type for field in fields(DraftConfig)}
# Optional parts, each with the setting value that disables it.
OPTIONAL: list[tuple[Part, Any]] = [(part, False if KINDS[part.key] is bool else 0) for part in PARTS if part.key]
# Settings of the parts beyond the paper, each with the value that disables it.
EXTRAS: dict[str, Any] = {part.key: off for part, off in OPTIONAL if part.beyond}


def expectation(key: str, value: Any) -> str | None:
    """Return a description of the valid values if `value` is invalid for the setting `key`, else None."""
    if KINDS[key] is bool:
        return None if isinstance(value, bool) else "true or false"
    least = MINIMUM.get(key, 0)
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
    reason = ", since slot 0 is never drafted" if key == "block_size" else ""
    return None if valid else f"an integer >= {least}{reason}"


def draft_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the drafter settings stored under either key, or None if neither holds an object."""
    return next((config[key] for key in FLEXDRAFT_KEYS if isinstance(config.get(key), dict)), None)


def target_identity(target: Any) -> dict[str, Any]:
    """Return the `config.json` entries that identify a target, read from its `PretrainedConfig`."""
    return {key: getattr(target, name) for key, name in IDENTITY.items()}


def other_target(config: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Return the first mismatch between the target a drafter was trained for and a given one, or None if they match.

    Args:
        config: the drafter's `config.json`.
        identity: `target_identity` of the given target.
    """
    different = (key for key, value in identity.items() if config.get(key) != value)
    return next((f"{key}={config.get(key)}, but this one has {identity[key]}" for key in different), None)
