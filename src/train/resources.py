"""Target, tokenizer and data: each loaded once, when first needed, and checked before anything expensive."""

from functools import cached_property

from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.chat import encode_prompt
from data.conversations import read_prompts
from data.errors import UserError
from data.packing import Row
from models.target import load_config, load_target, load_tokenizer
from train.checks import TRAINED, check_path, check_target
from train.datamodule import prepare_rows


class Resources:
    """What the stages of one run share."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.target_settings = OmegaConf.to_container(config.model.target, resolve=True)
        self.name = self.target_settings["name"]
        self.revision = self.target_settings["revision"]
        self.architecture = self.target_settings["architecture"]

    def check(self, stage: str) -> None:
        """Everything that the stage, and an evaluation after it, can know without the target's weights.

        Raises:
            UserError: target, tokenizer, data and settings do not fit together.
        """
        check_target(self.config, self.target_config, self.tokenizer)
        if stage in TRAINED:
            self.rows  # noqa: B018  read and checked
        if "evaluate" in self.config.stages:
            self.prompts  # noqa: B018  better now than after the training

    def forget_target(self) -> None:
        """Drop the target, to load it afresh: ZeRO 3 leaves it in pieces."""
        self.__dict__.pop("target", None)

    @cached_property
    def target_config(self) -> PretrainedConfig:
        if (self.name is None) == (self.architecture is None):
            raise UserError(
                f"model.target.name={self.name!r}, model.target.architecture={self.architecture!r}: "
                "give a name, or an architecture for random weights, and not both."
            )
        if self.name is None:
            return load_config(None, architecture=self.architecture)
        check_path(self.name)
        try:
            return load_config(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            raise UserError(f"model.target.name={self.name!r}: the target's config did not load. {error}") from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        name = self.target_settings["tokenizer"] or self.name
        if name is None:
            raise UserError("model.target.tokenizer is not set, and random weights bring none. Name a tokenizer.")
        try:
            return load_tokenizer(name, revision=self.revision if name == self.name else None)
        except (OSError, ValueError) as error:
            raise UserError(f"model.target.tokenizer={name!r}: the tokenizer did not load. {error}") from error

    @cached_property
    def target(self) -> PreTrainedModel:
        try:
            return load_target(
                self.name,
                revision=self.revision,
                architecture=self.architecture,
                dtype=self.target_settings["dtype"],
                attn_implementation=self.target_settings["attn_implementation"],
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"model.target: the target did not load. {error}") from error

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row]]:
        """Training and validation rows."""
        data = OmegaConf.to_container(self.config.data, resolve=True)
        del data["prompts"]
        return prepare_rows(
            self.tokenizer, **data, block_size=self.config.model.draft.block_size, seed=self.config.seed
        )

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids of the held-out prompts."""
        data, settings = self.config.data, self.config.stage.evaluate
        messages = read_prompts(data.prompts, max_records=settings.num_prompts)
        encoded = [encode_prompt(self.tokenizer, m, OmegaConf.to_container(data.template_kwargs)) for m in messages]
        limit = (
            self.target_config.max_position_embeddings - settings.max_new_tokens - self.config.model.draft.block_size
        )
        fitting = [tokens for tokens in encoded if len(tokens) <= limit]
        if not fitting:
            raise UserError(
                f"stage.evaluate.max_new_tokens={settings.max_new_tokens}: no prompt of data.prompts={data.prompts} "
                f"leaves so much room in the target's {self.target_config.max_position_embeddings} positions. "
                "Choose fewer."
            )
        return fitting
