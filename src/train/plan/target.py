"""Find the target's config without network access, and check the settings against it."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, PretrainedConfig

from data.config.compose import preset
from data.errors import UserError
from models.families import check_architecture, max_text_length
from models.readable import CONFIG_FILES, reading
from train.settings.checks import check_path, check_sizes, check_target


def local_config(config: DictConfig) -> PretrainedConfig:
    """Return the target's config and check the settings against it.

    The config is read from config.json in the target's directory or the Hub cache, or else built from
    `model.target.architecture`.

    Raises:
        UserError: neither source is available, config.json is damaged or contradicts `model.target.architecture`, the
            architecture describes a different target or is not supported, or the settings do not fit the target.
    """
    found = _find(config.model.target)
    try:
        check_architecture(found)
    except ValueError as error:
        raise UserError(f"model.target: {error}") from error
    check_target(config, found, max_text_length(found, config.model.draft.block_size))
    return found


def _find(target: DictConfig) -> PretrainedConfig:
    given: Any = OmegaConf.to_container(target.architecture, resolve=True) if target.architecture else None
    if target.name is None and given is None:
        raise UserError("model.target: give a name, or an architecture for random weights.")
    if target.name is not None:
        check_path(target.name)
        try:
            with reading(target.name, "config", CONFIG_FILES):
                found = AutoConfig.from_pretrained(target.name, revision=target.revision, local_files_only=True)
        except OSError:
            _check_given(target.name, given)
        else:
            check_sizes(given or {}, {key: getattr(found, key, None) for key in given or {}})
            return found
    with reading(target.name or "model.target.architecture", "config", ()):
        return AutoConfig.for_model(**given)


def _check_given(name: str, given: dict[str, Any] | None) -> None:
    """Check that `model.target.architecture` describes a target whose config is not on this machine.

    Raises:
        UserError: the setting is null, or it describes a different target.
    """
    if given is None:
        raise UserError(
            f"model.target.name={name}: its config.json is not on this machine, and plan=true downloads nothing. Give "
            "the sizes in model.target.architecture, as conf/model/qwen3_8b.yaml does."
        )
    chosen = HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None
    described = preset("model", chosen).target.get("name") if chosen else None
    if described not in (None, name):
        raise UserError(
            f"model.target.name={name}, but model.target.architecture has the sizes of {described}. "
            "Choose model=custom, and give the sizes there if the target is not on this machine."
        )
