"""Target, tokenizer and data of a run. Each is loaded once, on first use, and checked before any expensive work."""

from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder, load_encoder
from data.preprocess.packing import PackedRows
from data.preprocess.prepare import describe, prepare
from data.preprocess.questions import first_prompt_length
from data.sources.benchmarks import read_benchmark
from data.sources.hub_commit import commit_of
from data.sources.readers import Source, open_sources
from data.sources.records import Conversation
from models.decoding.flex import check_untested
from models.families import check_architecture, check_trainable, max_text_length
from models.target import load_config, load_target
from train.evaluate.run import decoding_settings
from train.loop.validation_decoding import live_decoding
from train.names import TRAINED
from train.run_dir.target_files import hashes, in_directory, on_hub, target_files, tokenizer_files
from train.settings.checks import check_path, check_sizes, check_target
from train.terminal import say


class Resources:
    """Target, tokenizer and data shared by the stages of a run."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.target_settings = cast(dict[str, Any], OmegaConf.to_container(config.model.target, resolve=True))
        self.name = self.target_settings["name"]
        self.revision = self.target_settings["revision"]
        self.architecture = self.target_settings["architecture"]

    def check(self, stage: str) -> None:
        """Check a stage, and an evaluation that runs after it, as far as possible without loading the target's weights.

        Raises:
            UserError: the target, tokenizer, data or settings are invalid or incompatible.
        """
        self.check_shape()
        if stage in TRAINED:
            try:
                check_trainable(self.target_config)
            except ValueError as error:
                raise UserError(f"model.target: {error}") from error
        if stage in TRAINED:
            for later in TRAINED:
                if later in self.config.stages:
                    live_decoding(self.config, later, self.rows[1], self.positions)  # only for its checks
        if "evaluate" in self.config.stages:
            try:
                decoding_settings(self.config)
            except ValueError as error:
                raise UserError(f"stage.evaluate.{error}") from error
            self.benchmarks  # noqa: B018  loaded now so that errors surface before training

    def check_shape(self) -> None:
        """Check the settings against the target's config, without loading its weights.

        Raises:
            UserError: the architecture is not supported, or the settings are incompatible with the target's config.
        """
        target_config = self.target_config  # outside the try block: its errors already name the setting
        try:
            check_architecture(target_config)
        except ValueError as error:
            raise UserError(f"model.target: {error}") from error
        check_target(self.config, target_config, self.positions)

    def forget_target(self) -> None:
        """Drop the target so that it is reloaded on next use: ZeRO 3 leaves its parameters partitioned."""
        self.__dict__.pop("target", None)

    @cached_property
    def target_config(self) -> PretrainedConfig:
        if self.name is None and self.architecture is None:
            raise UserError(
                "model.target.name and model.target.architecture are both null. Set a name, or an architecture to use "
                "random weights."
            )
        if self.name is None:
            return load_config(None, architecture=self.architecture)
        check_path(self.name)
        try:
            config = load_config(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            raise UserError(f"model.target.name={self.name!r}: failed to load the target's config. {error}") from error
        expected = self.architecture or {}
        check_sizes(expected, {key: getattr(config, key, None) for key in expected})  # getattr resolves aliases
        return config

    @cached_property
    def target_identity(self) -> dict[str, Any]:
        """Identity of the target, independent of its local path.

        Contains the hashes of all files that are read when the target is loaded and, for a Hub target, the repository
        and commit; for a target with random weights, the architecture and seed. A Hub target is downloaded to compute
        the hashes.

        Raises:
            UserError: as for `check_shape`.
        """
        if self.name is None:
            found = {"architecture": self.architecture, "seed": self.config.seed}
        elif Path(self.name).is_dir():
            found = hashes(target_files(in_directory(Path(self.name))))
        else:
            self.check_shape()  # reject unsupported targets before the weights are downloaded
            commit = commit_of(self.name, self.revision)
            found = hashes(target_files(on_hub(self.name, commit))) | {"repository": self.name, "commit": commit}
        other = self.target_settings["tokenizer"]
        if not other or other == self.name:
            return found
        local = Path(other).is_dir()
        files = tokenizer_files(in_directory(Path(other)) if local else on_hub(other, None))
        found |= {f"tokenizer/{name}": sha for name, sha in hashes(files).items()}
        return found if local else found | {"tokenizer": other}

    @property
    def positions(self) -> int:
        """Maximum number of tokens in a prompt plus its answer."""
        return max_text_length(self.target_config, self.config.model.draft.block_size)

    @property
    def encoder(self) -> ChatEncoder:
        """The target's chat template and tokenizer."""
        return self._encoder_and_tokenizer[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer, as loaded by transformers."""
        return self._encoder_and_tokenizer[1]

    @cached_property
    def _encoder_and_tokenizer(self) -> tuple[ChatEncoder, PreTrainedTokenizerBase]:
        given: Any = OmegaConf.to_container(self.config.data.template_kwargs, resolve=True)
        encoder, tokenizer = load_encoder(self.target_settings, given)
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        encoder.check_kwargs(given, overrides, _note)
        return encoder, tokenizer

    @cached_property
    def target(self) -> PreTrainedModel:
        try:
            # Random weights depend on the seed alone: a resumed run needs the same target, but may have drawn other
            # random numbers before.
            with nullcontext() if self.name else torch.random.fork_rng(devices=[]):
                if not self.name:
                    torch.manual_seed(self.config.seed)
                target = load_target(
                    self.name,
                    revision=self.revision,
                    architecture=None if self.name else self.architecture,
                    dtype=self.target_settings["dtype"],
                )
            check_untested(target, self.tokenizer)
            return target
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"model.target: failed to load the target. {error}") from error

    @cached_property
    def sources(self) -> list[Source]:
        """Sources of the training conversations."""
        data: Any = OmegaConf.to_container(self.config.data, resolve=True)
        return open_sources(data["path"], split=data["split"], max_records=data["max_records"], warn=_note)

    @cached_property
    def rows(self) -> tuple[PackedRows, PackedRows]:
        """Packed training and validation rows."""
        data = self.config.data
        prepared = prepare(
            self.sources,
            self.encoder,
            max_seq_len=data.max_seq_len,
            truncation=data.truncation,
            bad_records=data.bad_records,
            num_proc=data.num_proc,
            validation_records=data.validation_records,
            block_size=self.config.model.draft.block_size,
            seed=self.config.seed,
            rejects=Path(self.config.run_dir) / "rejects.jsonl",
        )
        say(describe(prepared))
        self._check_tokens(prepared.documents.largest_token())
        return prepared.training, prepared.validation

    def _check_tokens(self, largest: int) -> None:
        """Check that every token id in the data is in the target's vocabulary.

        A tokenizer may define more tokens than the target embeds: Gemma 3's has an extra image token.

        Raises:
            UserError: the data contains a token id outside the target's vocabulary.
        """
        vocabulary = self.target_config.vocab_size
        if largest >= vocabulary:
            name = self.target_settings["tokenizer"] or self.name
            raise UserError(
                f"data.path: tokenizer {name!r} produces token id {largest}, but the target's largest token id is "
                f"{vocabulary - 1}. Set model.target.tokenizer to the target's own tokenizer, or remove the records "
                "that contain such tokens."
            )

    @cached_property
    def benchmarks(self) -> dict[str, list[Conversation]]:
        """Conversations of each benchmark, without assistant turns.

        In every benchmark, at least one prompt leaves room for an answer within the target's context length.
        """
        settings = self.config.stage.evaluate
        longest = self.positions - settings.max_new_tokens
        found = {}
        benchmarks: Any = OmegaConf.to_container(self.config.benchmarks, resolve=True)
        for name, given in benchmarks.items():
            lengths: list[int] = []

            def check(talk: Conversation, lengths: list[int] = lengths) -> None:
                lengths.append(first_prompt_length(self.encoder, talk))

            conversations = read_benchmark(name, given, settings.num_prompts, check=check, warn=_note)
            if min(lengths) > longest:
                raise UserError(
                    f"stage.evaluate.max_new_tokens={settings.max_new_tokens}: every prompt in benchmarks.{name}.path="
                    f"{given['path']} is too long to leave room for that many tokens within the target's context "
                    f"length of {self.positions}. Decrease stage.evaluate.max_new_tokens."
                )
            found[name] = conversations
        if not found:
            raise UserError("benchmarks is empty: expected at least one benchmark. Presets: conf/benchmarks/.")
        return found


def _note(text: str) -> None:
    say(f"    {text}")
