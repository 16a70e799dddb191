"""Model card of an exported drafter, generated from the run's records."""

import hashlib
import json
import shlex
from pathlib import Path
from string import Template
from typing import Any, TypeGuard

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from data.config.compose import EMBEDDED
from data.errors import UserError
from models.artifact import CARD, RECOMMENDATION, read_config
from models.draft_config import DraftConfig
from models.export.fingerprint import KEY as FINGERPRINT
from models.export.recommendation import read_recommendation
from train.names import TRAINED, VARIANTS
from train.publish.redact import without_paths
from train.run_dir.state import file_sha256, publish, read_json, read_record

TRAINED_FILES = [f"{stage}/draft.safetensors" for stage in TRAINED]
PLOT = "acceptance_by_slot.png"
MINIMUM = "4.57"  # minimum transformers version for custom_generate/generate.py
NOWHERE = "path/to/this/directory"  # placeholder for the drafter's location until it is uploaded
# Settings shown in the card's commands, i.e. those that affect the drafter. Others, such as paths, may be private.
SHOWN: tuple[str, ...] = (
    "experiment",
    "recipe",
    "model",
    "data",
    "objective",
    "adapter",
    "stage",
    "stages",
    "runtime",
    "trainer",
)
SHOWN += ("seed", "name")
TEMPLATE = Path(__file__).with_name("model_card.md")
CALIBRATED = ", and a small MLP\ncorrects the draft logits once the bonus token is known"
LEGEND = """τ is the mean number of tokens per verify step, including the target's own (bonus) token; 95% is its
bootstrap interval over prompts. Identical counts the prompts whose output equals the target's exactly. `untuned` uses
the target's attention projections, and `attention_tuned` omits the calibrator."""


def is_outdated(run_dir: Path) -> bool:
    """Return whether the export is outdated: a stage that it depends on was rerun since, or has no record."""
    stage: str | None = "export"
    while stage:
        done = read_record(run_dir / "records" / f"{stage}.done.json")
        if not done:
            return True
        given = {name: value for name, value in done["settings"]["inputs"].items() if name in TRAINED_FILES}
        if any((run_dir / name).exists() and file_sha256(run_dir / name) != value for name, value in given.items()):
            return True
        stage = next((name.split("/")[0] for name in given), None)
    return False


def write_card(run_dir: Path) -> None:
    """Write the card and its plot to the export directory. The same records always produce the same card."""
    exported, records = run_dir / "export", {}
    for stage in (*TRAINED, "export", "evaluate"):
        if done := read_record(run_dir / "records" / f"{stage}.done.json"):
            records[stage] = done
    config = read_config(exported)
    if not DraftConfig.from_artifact(config).calibrator_rank:
        records.pop("bonus_calibration", None)  # the calibrator was not exported
    report = run_dir / "evaluate" / "report.json"
    if "evaluate" in records and not (report.exists() and _is_of(records["evaluate"], exported, config)):
        del records["evaluate"]
    figures = "This drafter has not been evaluated."
    if "evaluate" in records:
        try:
            measured = read_json(report)
        except ValueError as error:
            raise UserError(f"{report}: damaged. Evaluate again with overwrite=evaluate.") from error
        figures = _figures(measured, records["evaluate"]["settings"]["seed"]) + _recommended(exported)
    plot = run_dir / PLOT
    if "evaluate" in records and plot.exists():
        _publish_if_other(exported / PLOT, plot.read_bytes())
        figures += f"\n\n![acceptance by slot]({PLOT})"
    else:
        (exported / PLOT).unlink(missing_ok=True)
    text = f"{_header(records)}\n{_body(records, config, figures)}"
    _publish_if_other(exported / CARD, text.encode())


def _publish_if_other(file: Path, content: bytes) -> None:
    """Write a file only if its content changes, since the disk of a finished run may be read-only."""
    if not file.exists() or file.read_bytes() != content:
        publish(file, lambda temporary: temporary.write_bytes(content))


def named(card: str, repository: str) -> str:
    """Return the card with its examples changed to load the drafter from a Hub repository."""
    return card.replace(NOWHERE, repository)


def _is_of(evaluation: dict[str, Any], exported: Path, config: dict[str, Any]) -> bool:
    """Return whether an evaluation record belongs to the current export."""
    inputs = evaluation["settings"]["inputs"]
    now: dict[str, Any] = {f"export/{file.name}": file_sha256(file) for file in exported.glob("*.safetensors")}
    now["export/config.json"] = config
    return now == {name: value for name, value in inputs.items() if name.startswith("export/")}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(found: dict[str, Any]) -> str:
    return "-" if found["low"] is None else f"{found['low']:.2f}-{found['high']:.2f}"


def _header(records: dict[str, Any]) -> str:
    target = records["export"]["settings"]["model"]["target"]
    known: dict[str, Any] = _license(target) | ({"base_model": target["name"]} if _on_hub(target["name"]) else {})
    trained = [record for stage, record in records.items() if stage in TRAINED]
    datasets = sorted({path for one in trained for path in _paths(one) if _on_hub(path)})
    data = ModelCardData(
        library_name="transformers", tags=["speculative-decoding", "flexdraft"], datasets=datasets or None, **known
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _on_hub(name: str | None) -> TypeGuard[str]:
    return name is not None and name.count("/") == 1 and without_paths(name) == name


def _license(target: dict[str, Any]) -> dict[str, str]:
    """Return the license entries in the target's model card, if the card is on this machine."""
    if target["name"] is None:
        return {}
    place = Path(target["name"].replace("${embedded:}", str(EMBEDDED)), CARD)
    if _on_hub(target["name"]):
        cached = try_to_load_from_cache(target["name"], CARD, revision=target["revision"])
        place = Path(cached) if isinstance(cached, str) else place
    if not place.is_file():
        return {}
    given = ModelCard(place.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {key: given[key] for key in ("license", "license_name", "license_link") if given.get(key)}


def _body(records: dict[str, Any], config: dict[str, Any], figures: str) -> str:
    target = records["export"]["settings"]["model"]["target"]
    name = without_paths(target["name"] or "random weights")
    revision = f', revision="{target["revision"]}"' if target["revision"] else ""
    draft = DraftConfig.from_artifact(config)
    columns = {stage: record for stage, record in records.items() if stage in TRAINED}
    rows = [_training(record, target) for record in columns.values()]
    last = list(columns.values())[-1]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        target=name if _on_hub(name) else f"the local model {name}",
        architecture="{model_type}, {num_target_layers} layers, hidden size {hidden_size}".format(**config),
        block_size=draft.block_size,
        layers=draft.num_layers,
        calibrator=CALIBRATED if draft.calibrator_rank else "",
        fingerprint=_fingerprint(config),
        minimum=MINIMUM,
        transformers=_transformers(last),
        beyond=_beyond(draft),
        figures=figures,
        load_target=f'"{_place(name)}"{revision}, dtype="{target["dtype"]}"',
        load_tokenizer=f'"{_place(without_paths(target["tokenizer"] or name))}"',
        template="".join(f', "{key}": {value!r}' for key, value in _template(columns).items()),
        drafter=NOWHERE,
        training=_table(["", *columns], [[key, *(row[key] for row in rows)] for key in rows[0]]),
        commands="\n".join(["```bash", *_commands(records), "```"]),
        versions=_versions(last),
    )


def _fingerprint(config: dict[str, Any]) -> str:
    """Describe the target's fingerprint. Return an empty string if the export, made by an earlier version, has none."""
    if FINGERPRINT not in config:
        return ""
    digest = hashlib.sha256(json.dumps(config[FINGERPRINT], sort_keys=True).encode()).hexdigest()
    return (
        f"\n`config.json` contains a fingerprint of the target's weights ({digest[:12]}). Loading the drafter\n"
        "with different weights, e.g. a fine-tuned variant's, issues a warning: decoding stays lossless, but fewer\n"
        "drafts are accepted.\n"
    )


def _transformers(record: dict[str, Any]) -> str:
    """Describe the transformers version that the drafter was trained and evaluated with."""
    version = record["environment"].get("transformers")
    return f"trained and evaluated with {version}" if version else "the version used was not recorded"


def _beyond(draft: DraftConfig) -> str:
    """Describe the drafter's extensions beyond the paper, which some decoders do not support."""
    parts = [part.beyond for part in draft.parts() if part.beyond]
    if not parts:
        return ""
    return (
        f"\nThis drafter extends the paper: {' and '.join(parts)}.\nBoth decoders below support this. Other "
        "decoders ignore the additional tensors and accept fewer drafts.\n"
    )


def _place(name: str) -> str:
    return name if _on_hub(name) else f"path/to/{name}"


def _template(trained: dict[str, Any]) -> dict[str, Any]:
    """Return the chat template arguments."""
    return next(iter(trained.values()))["settings"]["data"]["template_kwargs"]


def _figures(report: dict[str, Any], seed: int) -> str:
    """Format the acceptance, the decoding settings and, if measured, the speed."""
    how = report["how"]
    sampling, selection = how["sampling"], how["selection"]
    sampled = "greedy"
    if sampling["temperature"]:
        sampled = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
    selected = selection["rule"] + (f" {selection['threshold']:g}" if selection["rule"] != "off" else "")
    rows = [
        [name, variant, _figure(v["tau"]), _interval(v), f"{v['verify_steps']:,}"]
        + [f"{v['identical']}/{one['prompts']}"]
        for name, one in report["benchmarks"].items()
        for variant, v in sorted(one["variants"].items(), key=lambda found: VARIANTS.index(found[0]))
    ]
    protocol = (
        f"Decoding: {sampled}, {report['dtype']}, up to {how['max_new_tokens']} new tokens, "
        f"selective verification {selected}, seed {seed}."
    )
    text = [_table(["benchmark", "drafter", "τ", "95%", "verify steps", "identical"], rows), f"{protocol}\n{LEGEND}"]
    text += _by_kind(next(reversed(report["benchmarks"].values())).get("by_kind", {}))
    if report["speed"]:
        text += _speed(report["speed"])
    return "\n\n".join(text)


def _by_kind(kinds: dict[str, Any]) -> list[str]:
    """Return a table with τ by kind of answer, if there are several kinds. Earlier versions did not record them."""
    if len(kinds) < 2:
        return []
    names = sorted(next(iter(kinds.values()))["variants"], key=VARIANTS.index)
    rows = []
    for kind, group in kinds.items():
        taus = [group["variants"][name] for name in names]
        rows.append(
            [
                kind,
                f"{group['prompts']}",
                *(f"{_figure(t['tau'])} ({_interval(t)})" if t["verify_steps"] else "-" for t in taus),
            ]
        )
    return [f"τ by kind of answer, with its 95% interval:\n\n{_table(['kind', 'prompts', *names], rows)}"]


def _recommended(exported: Path) -> str:
    """Return the evaluation's recommendation as a paragraph; empty if there is none."""
    found = read_recommendation(exported)
    if not found:
        return ""
    rows, rule = found["parallel_rows"], found["selection"]
    modes = f"parallel drafting up to batch size {rows}, sequential above" if rows else "sequential drafting"
    selection = rule if rule == "off" else f"{rule} {found['threshold']:g}"
    device = found.get("device", "the device used in the evaluation")
    file = f"[`{RECOMMENDATION}`]({RECOMMENDATION})"
    return f"\n\nFastest on {device}, according to {file}: {modes}, selective verification {selection}."


def _speed(speed: dict[str, Any]) -> list[str]:
    rows = []
    for name, (alone, drafted) in speed["by_benchmark"].items():
        rates = [alone["tokens_per_second"], drafted["tokens_per_second"]]
        rows.append([name, *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}x", drafted["decoder"]])
    header = ["benchmark", "target alone, tokens/s", "drafted, tokens/s", "speed-up", "mode"]
    return [_table(header, rows), f"Speed is measured with one prompt at a time, on {speed['device']}."]


def _training(record: dict[str, Any], target: dict[str, Any]) -> dict[str, str]:
    """Return the training settings and results of one stage as table rows."""
    settings, result = record["settings"], record["result"]
    stage, objective = settings["stage"], settings["objective"]
    terms = " + ".join(f"{objective[key]:g} {key.upper()}" for key in ("ce", "kl", "tv") if objective[key])
    return {
        "target": _revision(target),
        "data": ", ".join(map(without_paths, _paths(record))),
        "records, fingerprint": _records(settings["inputs"]["data"]),
        "tokens per row": f"{settings['data']['max_seq_len']:,}",
        "steps": f"{result['steps']:,}; weights from step {result['weights_of_step']:,}",
        "rows per step, blocks per row": f"{stage['global_batch_size']}, {stage['num_anchors']}",
        "learning rate": f"{stage['module']['learning_rate']:g}, cosine",
        "objective, slot weights": f"{terms}, {objective['weights']}",
        "arithmetic, seed": f"{settings['arithmetic']}, {settings['seed']}",
        "trained parameters": f"{result['trained_parameters']:,}",
        "hardware": record.get("hardware", "not recorded"),  # missing from records by earlier versions
    }


def _paths(record: dict[str, Any]) -> list[str]:
    """Return the data paths; `data.path` is a path, or a list of paths and sources."""
    path = record["settings"]["data"]["path"]
    return [one if isinstance(one, str) else one["path"] for one in (path if isinstance(path, list) else [path])]


def _records(parts: list[list[Any]]) -> str:
    """Format the record count and a short hash: the file's own or, for several files, a hash of their hashes."""
    hashes = [fingerprint.rsplit("/", 1)[-1] for fingerprint, _ in parts]
    one = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return f"{sum(taken for _, taken in parts):,}, {one[:12]}"


def _revision(target: dict[str, Any]) -> str:
    """Format the target's name and, for a Hub repository, the locally cached commit."""
    revision = target["revision"]
    if _on_hub(target["name"]):
        cached = try_to_load_from_cache(target["name"], "config.json", revision=revision)
        revision = Path(cached).parent.name if isinstance(cached, str) else revision
    return without_paths(target["name"] or "random weights") + (f" at {revision}" if revision else "")


def _commands(records: dict[str, Any]) -> list[str]:
    """Return the distinct commands that ran the stages; empty if the stages were run from Python."""
    commands = []
    for record in records.values():
        given = [o for o in record.get("overrides", []) if o.lstrip("+").split("=")[0].split(".")[0] in SHOWN]
        if given:
            commands.append(shlex.join(["python", "-m", "train", *map(without_paths, given)]))
    return list(dict.fromkeys(commands))


def _versions(record: dict[str, Any]) -> str:
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in record["environment"].items()) + "."


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
