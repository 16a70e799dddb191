"""The card of an exported drafter says what the records say, and nothing of this machine."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers.shared import ROOT
from huggingface_hub import ModelCard

from train.publish.model_card import is_outdated, named, write_card
from train.publish.redact import without_paths


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "short"))


def card(run: Path) -> str:
    write_card(run)
    return (run / "export" / "README.md").read_text(encoding="utf-8")


def change(run: Path, stage: str, *path: str, to) -> None:
    """Change a value of a stage's record."""
    file = run / "records" / f"{stage}.done.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    file.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.slow
def test_a_run_leaves_a_card_with_its_figures(trained_run):
    text = (trained_run / "export" / "README.md").read_text(encoding="utf-8")
    report = json.loads((trained_run / "evaluate" / "report.json").read_text(encoding="utf-8"))
    for variant, found in report["benchmarks"]["held_out"]["variants"].items():
        interval = f"{found['low']:.2f}-{found['high']:.2f}"
        steps = f"{found['verify_steps']:,}"
        assert f"| held_out | {variant} | {found['tau']:.2f} | {interval} | {steps} | {found['identical']}/6 |" in text
    assert "Decoding: greedy, float32, up to 40 new tokens, selective verification cumulative_product 0.01" in text
    done = json.loads((trained_run / "records" / "attention_tuning.done.json").read_text(encoding="utf-8"))
    digest, count = done["settings"]["inputs"]["data"][0]
    assert f"| {count}, {digest[:12]} |" in text and f"| {done['result']['trained_parameters']:,} |" in text
    assert "python -m train +experiment=tiny stage.attention_tuning.steps=40" in text
    plot = (trained_run / "export" / "acceptance_by_slot.png").read_bytes()
    assert plot == (trained_run / "acceptance_by_slot.png").read_bytes() and "(acceptance_by_slot.png)" in text


@pytest.mark.slow
def test_it_says_what_it_is_not_which_target_it_knows_and_what_runs_it(run):
    text = card(run)
    done = json.loads((run / "records" / "attention_tuning.done.json").read_text(encoding="utf-8"))
    assert "**Do not load it with `AutoModelForCausalLM.from_pretrained`**" in text
    assert f"4.57 or newer (trained and evaluated with {done['environment']['transformers']})" in text
    assert "transformers (4.57 or newer)" in (run / "export" / "custom_generate" / "generate.py").read_text()
    config = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(config["target_fingerprint"], sort_keys=True).encode()).hexdigest()
    assert f"a fingerprint of the target's weights ({digest[:12]})" in text
    del config["target_fingerprint"]
    (run / "export" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "fingerprint of the target" not in card(run)


@pytest.mark.slow
def test_its_header_is_one(trained_run):
    data = ModelCard.load(trained_run / "export" / "README.md").data
    assert data.library_name == "transformers" and {"speculative-decoding", "flexdraft"} <= set(data.tags)
    assert data.base_model is None and data.license is None  # of a local target without a card


@pytest.mark.slow
def test_it_says_nothing_of_this_machine(run):
    for stage in ("attention_tuning", "bonus_calibration"):
        change(run, stage, "settings", "data", "path", to=[{"path": str(run / "mine.jsonl"), "weight": 1}])
        change(run, stage, "overrides", to=[f"data.path=[{{path: {run}/mine.jsonl}}]", "export.push_to_hub=me/secret"])
    text = card(run)
    assert "mine.jsonl" in text and "path: mine.jsonl" in text
    assert not [word for word in (str(run.parent), str(ROOT), str(Path.home()) + "/", "${", "secret") if word in text]


@pytest.mark.slow
def test_the_same_records_give_the_same_card(run):
    before = (run / "export" / "README.md").read_bytes()
    assert card(run).encode() == before


@pytest.mark.slow
def test_without_an_evaluation_it_says_so(run):
    (run / "records" / "evaluate.done.json").unlink()
    text = card(run)
    assert "This drafter has not been evaluated." in text and "acceptance_by_slot" not in text
    assert not (run / "export" / "acceptance_by_slot.png").exists()


@pytest.mark.slow
def test_what_is_nobodys_business_is_not_in_the_command(run):
    for stage in ("attention_tuning", "bonus_calibration", "export", "evaluate"):
        done = run / "records" / f"{stage}.done.json"
        record = json.loads(done.read_text())
        record["overrides"] += ["+logger.api_key=deadbeef", "hydra.launcher.setup=[export HF_TOKEN=hf_abc]"]
        done.write_text(json.dumps(record))
    text = card(run)
    assert "+experiment=tiny" in text and "deadbeef" not in text and "hf_abc" not in text


@pytest.mark.slow
def test_a_stage_trained_again_outdates_the_export(run):
    assert not is_outdated(run)
    weights = run / "attention_tuning" / "draft.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((run / "bonus_calibration" / "draft.safetensors").read_bytes())
    assert is_outdated(run)
    weights.write_bytes(before)
    (run / "records" / "attention_tuning.done.json").unlink()
    assert is_outdated(run)


@pytest.mark.slow
def test_without_a_plot_there_is_none_on_it(run):
    (run / "acceptance_by_slot.png").unlink()
    assert "| calibrated |" in card(run) and "acceptance_by_slot" not in card(run)


@pytest.mark.slow
def test_figures_of_another_drafter_are_none(run):
    assert "| calibrated |" in card(run)
    shutil.copyfile(run / "attention_tuning" / "draft.safetensors", run / "export" / "model.safetensors")
    assert "This drafter has not been evaluated." in card(run)


@pytest.mark.slow
def test_a_target_on_the_hub(run):
    change(run, "export", "settings", "model", "target", "name", to="someone/target")
    change(run, "export", "settings", "model", "target", "revision", to="abc")
    text = card(run)
    assert ModelCard(text).data.base_model == "someone/target"
    assert 'from_pretrained("someone/target", revision="abc", dtype="float32")' in text
    assert "| target | someone/target at abc | someone/target at abc |" in text


@pytest.mark.slow
def test_the_license_is_the_targets(run, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    change(run, "export", "settings", "model", "target", "name", to=str(tmp_path / "target"))
    assert ModelCard(card(run)).data.license == "apache-2.0"


@pytest.mark.slow
def test_a_drafter_that_is_not_calibrated(run):
    file = run / "export" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["flexdraft_config"]["enable_anchor_bias_logits"] = False
    file.write_text(json.dumps(config), encoding="utf-8")
    text = card(run)
    assert "small MLP" not in text and "|  | attention_tuning |\n" in text


@pytest.mark.slow
def test_what_a_drafter_has_beyond_the_paper(run):
    assert "extends the paper" not in card(run)
    file = run / "export" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["flexdraft_config"] |= {"bonus_slot": True, "chain_rank": 16}
    file.write_text(json.dumps(config), encoding="utf-8")
    text = card(run)
    assert (
        "This drafter extends the paper: slot 0 encodes the bonus token" in text and "on the previously drafted" in text
    )
    assert "decoders ignore the additional tensors" in text


def test_its_examples_load_it_by_name():
    assert named('load_draft("path/to/this/directory", target)', "owner/name") == 'load_draft("owner/name", target)'


@pytest.mark.parametrize(
    "given, shown",
    [
        ("data.path=/srv/private/talk.jsonl", "data.path=talk.jsonl"),
        ("data.path=~/talk.jsonl", "data.path=talk.jsonl"),
        ("data.path=../talk.jsonl", "data.path=talk.jsonl"),
        ("data.path=[{path: /a/b.jsonl, weight: 2}, c/d/e.jsonl]", "data.path=[{path: b.jsonl, weight: 2}, e.jsonl]"),
        ("data.path=/srv/anna b/my data/secret project/x.jsonl", "data.path=x.jsonl"),
        ("data.path=https://host/x.jsonl?token=abc123", "data.path=x.jsonl"),
        ("data.path=C:\\Users\\me\\x.jsonl", "data.path=x.jsonl"),
        ("model.target.name=Qwen/Qwen3-8B", "model.target.name=Qwen/Qwen3-8B"),
        ("${embedded:}/target", "target"),
        ("+experiment=tiny", "+experiment=tiny"),
        ("stage.evaluate.speed.batch_sizes=[1,2]", "stage.evaluate.speed.batch_sizes=[1,2]"),
    ],
)
def test_paths_are_shown_by_their_last_part(given, shown):
    assert without_paths(given) == shown


def test_a_directory_that_looks_like_a_repository(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_paths("models/mine") == "mine"
