"""Wrong calls end here: before anything is downloaded, loaded or written."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError

STAGES = ("attention_tuning", "bonus_calibration", "export", "evaluate")
TRAINED = STAGES[:2]
VARIANTS = ("untuned", "attention_tuned", "calibrated")
# Passed on as they are to templates, architectures, Trainer, loggers and callbacks, which know their own keys.
NULLABLE = ("model.target.name",)  # null asks for random weights
FREE_FORM = ("data.template_kwargs", "model.target.architecture", "trainer", "logger", "callbacks", "hydra")


def check_config(config: DictConfig) -> None:
    """Check names, types and ranges of all settings.

    Raises:
        UserError: naming the setting, its value, what was expected and the way out.
    """
    if OmegaConf.is_missing(config, "name"):
        raise UserError("No experiment chosen. Try: python -m train +experiment=tiny   (all: conf/experiment/)")
    _check_against_files(config)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise UserError(
            f"Settings without a value: {', '.join(missing)}. Give them on the command line or in an experiment."
        )
    _check_stages(config)
    _check_ranges(config)


def known_settings(overrides: list[str]) -> dict[str, Any]:
    """The configuration with only the choices of files among `overrides`: what conf/ knows."""
    groups = ("experiment", "data", "model", "stage", "trainer", "logger", "callbacks")
    choices = [o for o in overrides if o.split("=")[0].lstrip("+~") in groups]
    known: Any = OmegaConf.to_container(compose("config", overrides=choices), resolve=False)
    return known


def _check_against_files(config: DictConfig) -> None:
    """Every key must be one that conf/ knows, and of the same type as there."""
    known = known_settings(list(HydraConfig.get().overrides.task))
    _compare(OmegaConf.to_container(config, resolve=False), known, known, "")


def _compare(given: Any, known: Any, root: dict[str, Any], path: str) -> None:
    if path in FREE_FORM:
        return
    if isinstance(known, dict):
        if not isinstance(given, dict):
            raise UserError(f"{path}={given!r}: a group of settings, not a value. It holds: {', '.join(known)}.")
        for key, value in given.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise UserError(unknown_key(here, root))
            _compare(value, known[key], root, here)
    elif not _same_type(given, known) and path not in NULLABLE:
        raise UserError(f"{path}={given!r}: expected {type(known).__name__}, such as {known!r}.")


def unknown_key(key: str, root: dict[str, Any]) -> str:
    """What to say of a setting that nothing reads: those that sound like it, else those of its group."""
    leaves = _leaves(root, "")
    close = get_close_matches(key.rsplit(".", 1)[-1], {leaf.rsplit(".", 1)[-1] for leaf in leaves}, n=1)
    if close:
        same = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == close[0]]
        near = [leaf for leaf in same if leaf.rpartition(".")[0] == key.rpartition(".")[0]] or same
        return f"{key}: no such setting. Did you mean {' or '.join(near)}?"
    group = root
    for part in key.split(".")[:-1]:
        group = group.get(part, {})
    return f"{key}: no such setting. {key.rpartition('.')[0] or 'The top level'} has: {', '.join(map(str, group))}."


def _leaves(tree: Any, path: str) -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [path]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]


def _same_type(given: Any, known: Any) -> bool:
    if given is None:
        return known is None
    interpolated = any(isinstance(v, str) and "${" in v for v in (given, known))
    if known is None or interpolated or known == "???":
        return True
    if isinstance(known, bool) or isinstance(given, bool):
        return isinstance(known, bool) and isinstance(given, bool)
    if isinstance(known, float):
        return isinstance(given, int | float)
    return isinstance(given, type(known))


def _check_stages(config: DictConfig) -> None:
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        raise UserError(f"stages={list(config.stages)}: expected one or more of {', '.join(STAGES)}.")
    if "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name={config.name!r}: expected a plain directory name; it names checkpoints/<name>.")


def _check_ranges(config: DictConfig) -> None:
    """Ranges and choices of single settings."""
    draft = config.model.draft
    choices = {"model.target.dtype": ("float32", "bfloat16", "float64"), "stage.export.dtype": ("float32", "bfloat16")}
    # The masks are boolean and four-dimensional, which the other implementations read differently or not at all.
    choices["model.target.attn_implementation"] = ("sdpa",)
    choices |= {f"stage.{stage}.module.objective.weights": ("dpace", "decay", "flat") for stage in TRAINED}
    for key, known in choices.items():
        if (value := OmegaConf.select(config, key)) not in known:
            raise UserError(f"{key}={value!r}: expected {' or '.join(known)}.")
    at_least = {"model.draft.num_layers": 1, "model.draft.block_size": 2, "model.draft.calibrator_rank": 1}
    at_least |= {"data.row_length": 2, "data.validation_records": 0, "stage.evaluate.num_prompts": 1}
    at_least |= {"stage.evaluate.max_new_tokens": 1}
    for stage in TRAINED:
        keys = ("steps", "rows_per_step", "num_anchors", "validate_every", "checkpoint_every", "module.objective.chunk")
        at_least |= {f"stage.{stage}.{key}": 1 for key in keys}
    for key, least in at_least.items():
        value = OmegaConf.select(config, key)
        if value < least:
            raise UserError(f"{key}={value}: expected {least} or more.")
    for stage in TRAINED:
        settings = config.stage[stage]
        if not settings.module.learning_rate > 0:
            raise UserError(
                f"stage.{stage}.module.learning_rate={settings.module.learning_rate}: expected more than 0."
            )
        objective = settings.module.objective
        shares = {"warmup_share": settings.module.warmup_share, "final_lr_share": settings.module.final_lr_share}
        for key, share in {**shares, "objective.alpha": objective.alpha}.items():
            if not 0 <= share <= 1:
                raise UserError(f"stage.{stage}.module.{key}={share}: expected 0 to 1.")
        if not objective.gamma > 0:
            raise UserError(f"stage.{stage}.module.objective.gamma={objective.gamma}: expected more than 0.")
    unknown = [name for name in config.stage.evaluate.variants if name not in VARIANTS]
    if unknown or not config.stage.evaluate.variants:
        variants = list(config.stage.evaluate.variants)
        raise UserError(f"stage.evaluate.variants={variants}: expected one or more of {', '.join(VARIANTS)}.")
    if draft.block_size > config.data.row_length:
        raise UserError(
            f"model.draft.block_size={draft.block_size} exceeds data.row_length={config.data.row_length}; "
            "make rows longer or blocks smaller."
        )


def check_target(config: DictConfig, target_config: Any, tokenizer: Any) -> None:
    """Check the settings against the target's config and tokenizer, before its weights are read.

    Raises:
        UserError: draft layers, positions or vocabulary do not fit.
    """
    layers = config.model.draft.num_layers
    if layers > target_config.num_hidden_layers:
        raise UserError(
            f"model.draft.num_layers={layers}, but the target has {target_config.num_hidden_layers} layers; "
            "the draft layers are the last of them, choose fewer."
        )
    layer_types = getattr(target_config, "layer_types", None)
    sliding = getattr(target_config, "sliding_window", None) if layer_types is None else None
    if sliding or any(kind != "full_attention" for kind in layer_types or []):
        raise UserError(
            f"The target ({target_config.model_type}) has layers without full attention "
            f"(layer_types={layer_types}, sliding_window={sliding}); only full attention is supported."
        )
    longest, limit = config.data.row_length + config.model.draft.block_size, target_config.max_position_embeddings
    if longest > limit:
        raise UserError(f"data.row_length + model.draft.block_size = {longest} exceeds the target's {limit} positions.")
    if len(tokenizer) > target_config.vocab_size:
        raise UserError(
            f"The tokenizer {config.model.target.tokenizer or config.model.target.name!r} has {len(tokenizer)} tokens, "
            f"the target's vocabulary {target_config.vocab_size}: they do not match. Set model.target.tokenizer."
        )


def check_path(name: str) -> None:
    """A target given as a path must exist; otherwise transformers would look for it on the Hub.

    Raises:
        UserError: it does not.
    """
    looks_local = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_local and not Path(name, "config.json").exists():
        raise UserError(
            f"model.target.name={name}: no config.json there. Give a model's directory or a Hub id (owner/name)."
        )
