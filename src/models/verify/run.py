"""Check that an exported drafter is intact, fits its target, and is lossless.

    python -m models.verify checkpoints/tiny/export src/data/tiny/target
    python -m models.verify owner/drafter owner/target --revision v1 --dtype bfloat16

The cheapest checks run first: files, config, tensors and values, then the target's weights, then decoding. Each check
prints all its faults, and the first check with faults ends the run. The exit status is 1 if there are faults, else 0.
Warnings are not faults: the drafter is valid, but may not be worth using.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from warnings import catch_warnings, simplefilter

import data.threads  # noqa: F401

# isort: split
import torch  # after data.threads
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from models.artifact import CARD, CONFIG, decoder_faults, file_warnings, read_json
from models.decoding.flex import GenerationResult, check_untested, generate, stop_tokens
from models.decoding.generation_settings import active_settings
from models.decoding.requests import parse_integer
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export import weight_checks as weights
from models.export.artifact_io import load_draft
from models.export.config import config_faults
from models.export.download import artifact_directory, is_repository_name
from models.export.fingerprint import KEY as FINGERPRINT
from models.export.fingerprint import OtherTarget, compare
from models.export.recommendation import recommendation_faults
from models.families import check_architecture
from models.readable import one_line, reading
from models.target import load_config, load_target, vocabulary
from models.verify.prompts import Conversation, find_tokenizer, prompt_tokens, read_prompts

MODES = ("parallel", "sequential")
ROWS = 8  # batch size for decoding
LITTLE = 1.05  # up to this τ, drafts are almost never accepted; 1 means never
EXACT = (torch.float32, torch.float64)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    summary: str = ""  # printed if there are no faults
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verify(
    artifact: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    target_revision: str | None = None,
    prompts: list[Conversation] | None = None,
    dtype: str = "float32",
    max_new_tokens: int = 32,
    device: str = "cpu",
) -> Iterator[Check]:
    """Check an artifact, yielding the results in order, up to and including the first check with faults.

    Args:
        artifact, target: directories or Hub ids.
        revision, target_revision: branches, tags or commits of their Hub repositories.
        prompts: conversations to decode, each ending with a user turn; None for built-in questions.
        dtype: dtype of the target. In float32, every differing token is a fault; in lower precision, only a warning,
            since rounding may flip near ties.

    Raises:
        ValueError: the artifact or target does not exist, the target's architecture is not supported, the prompts
            cannot be decoded, or `max_new_tokens` is less than 1.
    """
    parse_integer("max_new_tokens", max_new_tokens, 1)
    directory = artifact_directory(artifact, revision=revision)
    target_config = _target_config(str(target), target_revision)
    for check in _without_target_weights(directory, target_config):
        yield check
        if check.faults:
            return
    loaded = load_target(str(target), revision=target_revision, dtype=dtype)
    loaded.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps `to`, which hides its signature
    tokenizer = find_tokenizer(str(target), target_revision)
    with reading(str(target), "generation settings", ("generation_config.json",)):  # validated only when used
        stop_tokens(loaded)
        cast(Any, loaded).generate(torch.tensor([[0]], device=loaded.device), max_new_tokens=1, tokenizer=tokenizer)
    check, draft = target_check(directory, loaded, tokenizer)
    yield check
    if draft is not None and not check.faults:
        yield decoding_check(draft, prompt_tokens(prompts, loaded, tokenizer), max_new_tokens, tokenizer)


def _without_target_weights(directory: Path, target: PretrainedConfig) -> Iterator[Check]:
    warnings = file_warnings(directory) + decoder_faults(directory)[1]
    card = "" if (directory / CARD).exists() else f"; no model card ({CARD})"
    summary = f"config, weights and decoder are present and readable{card}"
    yield Check("files", summary, weights.file_faults(directory), warnings)
    config = read_json(directory / CONFIG)
    faults = config_faults(config, target) + recommendation_faults(directory)
    yield Check("config", "" if faults else _described(config), faults)
    yield tensor_check(directory, config, target)
    yield Check("values", "all finite", *weights.value_faults(directory))


def tensor_check(directory: Path, config: dict[str, Any], target: PretrainedConfig) -> Check:
    """Check the tensors' names, shapes and dtypes from the file headers. The config must have no faults."""
    found = weights.headers(directory)
    faults = weights.shape_faults(found, *contract(config, target))
    faults += weights.dtype_faults(found, config.get("dtype", config.get("torch_dtype")))
    return Check("tensors", f"{len(found)} tensors with the expected names, shapes and dtype", faults)


def contract(config: dict[str, Any], target: PretrainedConfig) -> tuple[Shapes, Shapes]:
    """Return the shapes of the required and the optional tensors, derived from the architecture alone."""
    target = copy.deepcopy(target)
    target.vocab_size = config["vocab_size"]  # the target may have been resized
    with torch.device("meta"):  # without allocating weights
        draft = DraftModel(AutoModelForCausalLM.from_config(target), DraftConfig.from_artifact(config))
    return _shapes(draft.own_parameters()), _shapes(draft.shared_parameters())


def target_check(
    directory: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Check, DraftModel | None]:
    """Check the artifact against the target's weights and tokenizer. The drafter is None if it fails to load."""
    try:
        check_untested(target, tokenizer)
        with catch_warnings():
            simplefilter("ignore", OtherTarget)  # reported as a warning of this check instead
            draft = load_draft(directory, target)
    except ValueError as error:
        return Check("target", faults=[str(error)]), None
    faults = [
        f"{name}: differs from the target's tensor, which the drafter shares. It was altered, or belongs to a "
        "different target or revision. Export the drafter again with this target."
        for name in weights.foreign_tensors(directory, draft.shared_parameters())
    ]
    warnings = ["the projections equal the target's, so the drafter is untrained."] if is_untrained(draft) else []
    stored = read_json(directory / CONFIG).get(FINGERPRINT)
    if stored is not None and (warning := compare(stored, target).warning()):
        warnings.append(warning)
    known = "" if stored is not None else "; no fingerprint, so this may not be the target the drafter was trained for"
    if tokenizer is not None and len(tokenizer) > vocabulary(target):  # Gemma 3: 262,145 tokens, 262,144 rows
        warnings.append(
            f"the tokenizer has {len(tokenizer)} tokens, but the target's embeddings have {vocabulary(target)} rows. "
            "Prompts with token ids beyond that are rejected. Check that this is the target's tokenizer."
        )
    if tokenizer is None:
        warnings.append("the target has no tokenizer, so the prompts are random tokens and τ is not representative.")
    return Check("target", f"target and drafter load and match{known}", faults, warnings), draft


@torch.no_grad()
def is_untrained(draft: DraftModel) -> bool:
    """Return whether all projectors still equal the target's, as at initialization.

    If the target has adapters, its base layers are compared. Quantized projectors never compare equal.
    """
    originals = draft.target.model.layers[draft.split_layer :]
    return all(
        _is_copy(cast(Tensor, projector.weight), original.self_attn.get_submodule(name))
        for layer, original in zip(draft.layers, originals, strict=True)
        for name, projector in layer.get_submodule("self_attn").named_children()
        if name.endswith("_proj")
    )


def _is_copy(tensor: Tensor, original: nn.Module) -> bool:
    own = getattr(getattr(original, "base_layer", original), "weight", None)  # adapters wrap a base layer
    if not isinstance(own, Tensor) or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
        return False
    return torch.equal(tensor, own)


def decoding_check(
    draft: DraftModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Check:
    """Compare the drafter's greedy output in both modes with the target's, token by token.

    Args:
        prompts: [prompts][tokens].
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.

    Raises:
        ValueError: the prompts cannot be decoded.
    """
    target, differences, tau = draft.target, [], {}
    settings = {"max_new_tokens": max_new_tokens, "tokenizer": tokenizer}
    own = _decoded(target, None, prompts, **settings).tokens
    for mode in MODES:
        result = _decoded(target, draft, prompts, mode=mode, **settings)
        differences += _differences(mode, result.tokens, own)
        if result.accepted():
            tau[mode] = result.tau
    figures = ", ".join(f"τ {value:.2f} {mode}" for mode, value in tau.items())
    summary = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, up to {max_new_tokens} new tokens: "
    summary += figures or "no drafts were verified"
    warnings = []
    if tau and max(tau.values()) <= LITTLE:
        warnings.append(
            f"{figures}: almost no drafts are accepted. The drafter may be untrained or trained for a different target."
        )
    if not tau:
        warnings.append("no drafts were verified. Use different prompts, or increase --max-new-tokens.")
    if not differences and not tau:
        return Check("decoding", summary, warnings=warnings)
    if not differences:
        followed = ", ".join(f"{name}={value}" for name, value in active_settings(target).items())
        alone = f"the target's output under its generation_config ({followed})" if followed else "the target's output"
        return Check("decoding", f"{summary}; identical to {alone}", warnings=warnings)
    if target.dtype in EXACT:
        return Check("decoding", faults=differences, warnings=warnings)
    return Check("decoding", f"{summary}; near ties may flip in {target.dtype}", warnings=warnings + differences)


def _decoded(
    target: PreTrainedModel, draft: DraftModel | None, prompts: list[list[int]], **settings: Any
) -> GenerationResult:
    result = GenerationResult([], [])
    for start in range(0, len(prompts), ROWS):
        part = generate(target, draft, prompts[start : start + ROWS], **settings)
        result.tokens += part.tokens
        result.steps += part.steps
    return result


def _differences(mode: str, answers: list[list[int]], own: list[list[int]]) -> list[str]:
    """Describe the first differing token of each answer that differs from the target's own."""
    found = []
    for number, (answer, expected) in enumerate(zip(answers, own, strict=True), 1):
        pairs = itertools.zip_longest(answer, expected)
        place = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            got, right = answer[place : place + 1], expected[place : place + 1]
            found.append(f"{mode}, prompt {number}: new token {place} is {got}; the target alone generates {right}.")
    return found


def _target_config(name: str, revision: str | None) -> PretrainedConfig:
    """Load the target's config and check that its architecture is supported.

    Raises:
        ValueError: the target does not exist, its config cannot be read, or its architecture is not supported.
    """
    if Path(name).is_dir() and revision:
        raise ValueError(f"{name} is a local directory; revision={revision} requires a Hub repository.")
    if not Path(name).is_dir() and not is_repository_name(name):
        raise ValueError(f"{name}: no such directory, and not a Hub repository name (owner/name).")
    try:
        config = load_config(name, revision=revision)
    except OSError as error:
        raise ValueError(f"{name}: failed to load the target's config. {error}") from error
    try:
        check_architecture(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # the config class does not validate all value types
        raise ValueError(f"{name}: {CONFIG} does not describe a valid model ({one_line(error)}).") from error
    return config


def _described(config: dict[str, Any]) -> str:
    draft = DraftConfig.from_artifact(config)
    layers = f"the last {draft.num_layers} of {config['num_target_layers']} layers"
    return f"{config['model_type']}, {layers}, blocks of {draft.block_size}, {draft.described()}"


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _positive(text: str) -> int:
    """Parse a positive integer.

    Raises:
        ArgumentTypeError: `text` is not an integer >= 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.verify", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("artifact", help="directory of an exported drafter, or its Hub id")
    add("target", help="directory of its target, or its Hub id")
    add("--revision", help="branch, tag or commit of the artifact's repository")
    add("--target-revision", help="branch, tag or commit of the target's repository")
    add(
        "--prompts",
        type=Path,
        help="file of conversations in any format that training supports; default: built-in questions",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the target; default: float32")
    add("--max-new-tokens", type=_positive, default=32, metavar="N", help="new tokens per prompt; default: 32")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of target and drafter; default: cuda if available, else cpu",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line: print the result of every check and exit with status 1 if there are faults."""
    settings = vars(_arguments())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    faults = 0
    try:
        settings["prompts"] = settings["prompts"] and read_prompts(settings["prompts"])
        for check in verify(**settings):
            lines = [("fault", text) for text in check.faults] or [("ok", check.summary)]
            lines += [("warning", text) for text in check.warnings]
            for kind, text in lines:
                print(f"{kind:8} {check.name:9} {' '.join(text.split())}")
            faults += len(check.faults)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("interrupted; remaining checks skipped", file=sys.stderr)
        sys.exit(130)
    if faults:
        sys.exit(f"{faults} fault{'s' if faults > 1 else ''}; remaining checks skipped")
