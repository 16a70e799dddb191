"""Decide from records and files whether a stage is finished, resumed or restarted; metadata of the drafter file."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.records import TARGET, config, finished, record
from helpers.shared import ROOT
from safetensors.torch import save_file

from data.errors import UserError
from train.disk_space import check_disk, check_shared_memory
from train.endings.finite import advice
from train.resume.progress import FINISHED, RESTART, RESUME, next_action
from train.run_dir.disk import DiskError, as_user_error, check_access, remove_tree
from train.run_dir.drafter_file import check_fits, facts_in, facts_of, finished_weights, save_drafter
from train.run_dir.state import check_written, file_sha256
from train.run_dir.target_files import hashes, in_directory, target_files


def begun(run_dir):
    made = record(run_dir)
    made.begin(restart=True)
    (run_dir / "attention_tuning" / "checkpoints").mkdir(parents=True)
    (run_dir / "attention_tuning" / "checkpoints" / f"step-00000002-{'0' * 16}.ckpt").write_bytes(b"x")
    return made


def other(run_dir, stage="attention_tuning"):
    return record(run_dir, stage, {"stage": {"steps": 7}, "inputs": {"target": TARGET}})


@pytest.mark.slow
def test_overwrite_true_keeps_unchanged_training_and_a_named_stage_is_rerun(tmp_path):
    made, _ = finished(tmp_path)
    assert next_action(config(), "attention_tuning", made) == FINISHED
    assert next_action(config(overwrite=True), "attention_tuning", made) == FINISHED
    assert next_action(config(overwrite="attention_tuning"), "attention_tuning", made) == RESTART
    assert next_action(config(overwrite=True), "attention_tuning", other(tmp_path)) == RESTART
    half = begun(tmp_path / "half")
    assert next_action(config(overwrite=True), "attention_tuning", half) == RESUME
    evaluated, _ = finished(tmp_path, "evaluate", "report.json")
    assert next_action(config(overwrite=["evaluate"]), "attention_tuning", made) == FINISHED
    assert next_action(config(overwrite=True), "evaluate", evaluated) == RESTART


def test_a_refusal_names_exactly_the_stages_to_rerun(tmp_path):
    finished(tmp_path, "evaluate", "report.json")
    finished(tmp_path, "bonus_calibration")
    with pytest.raises(UserError, match=r"stage.steps: 6 -> 7.*\n.*overwrite=evaluate, which needs no training"):
        next_action(config(), "evaluate", other(tmp_path, "evaluate"))
    with pytest.raises(UserError, match=r"overwrite=\[bonus_calibration,export,evaluate\]") as refused:
        next_action(config(), "bonus_calibration", other(tmp_path, "bonus_calibration"))
    assert "attention_tuning" not in str(refused.value)


def test_a_requeued_job_does_not_overwrite_its_own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    made, asked = begun(tmp_path), config(overwrite="attention_tuning")
    assert next_action(asked, "attention_tuning", made) == RESTART  # the same command again, in the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert next_action(asked, "attention_tuning", made) == RESUME
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert next_action(asked, "attention_tuning", made) == RESTART


def test_settings_may_change_before_the_first_checkpoint(tmp_path):
    made = record(tmp_path)
    made.begin(restart=True)
    assert next_action(config(), "attention_tuning", made) == RESUME
    assert next_action(config(), "attention_tuning", other(tmp_path)) == RESTART
    begun(tmp_path)
    with pytest.raises(UserError, match="stage.steps: 6 -> 7"):
        next_action(config(), "attention_tuning", other(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"settings": {"sta', "[]", "\x00\x00"])
def test_a_damaged_record_is_reported_or_its_stage_rerun(tmp_path, content):
    made, _ = finished(tmp_path)
    made.done.write_text(content)
    with pytest.raises(UserError, match="attention_tuning.done.json is empty or damaged.*overwrite=attention_tuning"):
        next_action(config(), "attention_tuning", made)
    evaluated, _ = finished(tmp_path, "evaluate", "report.json")
    evaluated.done.write_text(content)
    assert next_action(config(), "evaluate", evaluated) == RESTART
    half = begun(tmp_path / "half")
    half.begun.write_text(content)
    with pytest.raises(UserError, match="attention_tuning.begun.json is empty or damaged.*overwrite=attention_tuning"):
        next_action(config(), "attention_tuning", half)


def test_a_missing_or_replaced_result_does_not_count_as_finished(tmp_path):
    made, file = finished(tmp_path)
    file.write_bytes(b"other")
    with pytest.raises(UserError, match="draft.safetensors is damaged or was replaced.*overwrite=attention_tuning"):
        next_action(config(), "attention_tuning", made)
    with pytest.raises(UserError, match="damaged or was replaced"):
        check_written(tmp_path, {"attention_tuning/draft.safetensors": file_sha256(file)})
    file.unlink()
    with pytest.raises(UserError, match="draft.safetensors is missing.*overwrite=attention_tuning"):
        next_action(config(), "attention_tuning", made)
    evaluated, report = finished(tmp_path, "evaluate", "report.json")
    report.unlink()
    assert next_action(config(), "evaluate", evaluated) == RESTART


def test_a_kill_during_deletion_of_the_old_result_is_recoverable(tmp_path):
    made, file = finished(tmp_path)
    made.drop()
    assert next_action(config(), "attention_tuning", made) == RESTART
    file.unlink()
    assert next_action(config(), "attention_tuning", made) == RESTART


def test_weights_without_a_record_are_not_overwritten(tmp_path):
    (tmp_path / "attention_tuning").mkdir()
    (tmp_path / "attention_tuning" / "draft.safetensors").write_bytes(b"by hand")
    with pytest.raises(UserError, match="has no record"):
        next_action(config(), "attention_tuning", record(tmp_path))


CHANGES = {
    "model.draft.block_size": ("8", 4),
    "model.draft.num_layers": ("6", 3),
    "model.draft.bonus_slot": ("false", True),
    "data.template_kwargs": ("{}", {"enable_thinking": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", CHANGES)
def test_a_drafter_with_other_settings_is_refused_with_both_values(tmp_path, setting):
    file = tmp_path / "run" / "attention_tuning" / "draft.safetensors"
    save_drafter(file, {"a": torch.zeros(2)}, facts_of(config(), TARGET, calibrated=False))
    copied = tmp_path / "copied" / "attention_tuning" / "draft.safetensors"
    shutil.copytree(file.parent, copied.parent)
    facts, (before, value) = facts_in(copied, TARGET), CHANGES[setting]
    check_fits(copied, facts, config(), TARGET, "export")
    check_fits(copied, facts, config(model__draft__calibrator_rank=7), TARGET, "bonus_calibration")  # not in stage 1
    with pytest.raises(UserError) as refused:
        check_fits(copied, facts, config(**{setting.replace(".", "__"): value}), TARGET, "bonus_calibration")
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    assert f"{setting}={before}" in str(refused.value) and f"{setting}={shown}" in str(refused.value)


@pytest.mark.slow
def test_a_drafter_of_another_target_or_another_rank_is_refused(tmp_path):
    file = tmp_path / "bonus_calibration" / "draft.safetensors"
    save_drafter(file, {"a": torch.zeros(2)}, facts_of(config(), TARGET, calibrated=True))
    facts = facts_in(file, TARGET)
    with pytest.raises(UserError, match="calibrator_rank=256.*calibrator_rank=7"):
        check_fits(file, facts, config(model__draft__calibrator_rank=7), TARGET, "export")
    with pytest.raises(UserError, match=f"a different target.*config.json: {'a' * 12} -> {'b' * 12}"):
        check_fits(file, facts, config(), {"config.json": "b" * 64}, "export")


def test_a_drafter_file_without_metadata_needs_its_record(tmp_path):
    file = tmp_path / "attention_tuning" / "draft.safetensors"
    file.parent.mkdir()
    save_file({"a": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="was written by an earlier version, which did not store the training setup"):
        facts_in(file, TARGET)
    old = {"model": {"draft": {"num_layers": 6, "block_size": 8}, "target": {"name": "/t"}}}
    old |= {"data": {"template_kwargs": {}}, "inputs": {"t/config.json": "a" * 64, "t/notes.json": "c" * 64}}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "attention_tuning.done.json").write_text(json.dumps({"settings": old}))
    check_fits(file, facts_in(file, TARGET), config(), TARGET, "bonus_calibration")
    with pytest.raises(UserError, match="block_size=8.*block_size=4"):
        check_fits(file, facts_in(file, TARGET), config(model__draft__block_size=4), TARGET, "bonus_calibration")


def test_a_missing_calibrated_drafter_is_not_exported_without_its_calibrator(tmp_path):
    finished(tmp_path)
    _, file = finished(tmp_path, "bonus_calibration")
    file.unlink()
    with pytest.raises(UserError, match="bonus_calibration/draft.safetensors is missing"):
        finished_weights(tmp_path)


def test_the_same_drafter_is_saved_as_the_same_bytes(tmp_path):
    contents = set()
    for number in range(5):
        save_drafter(tmp_path / str(number), {"a": torch.zeros(2)}, facts_of(config(), TARGET, calibrated=True))
        contents.add((tmp_path / str(number)).read_bytes())
    assert len(contents) == 1


def content(directory):
    return hashes(target_files(in_directory(directory)))


def test_a_target_is_identified_by_content_not_location(tmp_path):
    here, there = tmp_path / "a", tmp_path / "elsewhere" / "b"
    for place in (here, there):
        place.mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (place / name).write_text(name)
    for name in ("notes.json", "trainer_state.json", "consolidated.safetensors", "vocab.json", "README.md"):
        (there / name).write_text("new")
    assert content(here) == content(there)
    (there / "chat_template.jinja").write_text("{{ messages }}")
    assert content(here) != content(there)
    shards = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (there / "model.safetensors").unlink()
    (there / "model.safetensors.index.json").write_text(json.dumps(shards))
    (there / "model-00001-of-00001.safetensors").write_text("shard")
    assert "model-00001-of-00001.safetensors" in content(there)


def test_an_undeletable_file_ends_an_overwrite_and_links_are_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "other" / "attention_tuning"
    precious.mkdir(parents=True)
    (precious / "draft.safetensors").write_bytes(b"healthy")
    (tmp_path / "attention_tuning").symlink_to(precious)
    with pytest.raises(DiskError, match="symbolic link"):
        remove_tree(tmp_path / "attention_tuning")
    assert (precious / "draft.safetensors").exists()

    monkeypatch.setattr(Path, "unlink", lambda path, **how: pytest.fail("nothing is there"))
    remove_tree(tmp_path / "gone")  # also on a read-only disk

    def refuse(name, *arguments, **how):
        raise PermissionError(1, "Operation not permitted", str(name))

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(DiskError, match="cannot delete draft.safetensors: Operation not permitted.*chattr"):
        remove_tree(precious)


@pytest.mark.parametrize(("stage", "name"), [("attention_tuning", "adapter"), ("export", "export")])
def test_a_link_in_place_of_a_result_is_refused_before_training(tmp_path, stage, name):
    from train.context import Resources

    (tmp_path / "other").mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).symlink_to(tmp_path / "other")
    resources = Resources(config())
    with pytest.raises(DiskError, match=f"run/{name} is a symbolic link to .*other"):
        check_disk(config(), resources, run_dir, ["attention_tuning", "bonus_calibration", "export"])
    assert "target" not in vars(resources)
    check_disk(config(), resources, run_dir, ["bonus_calibration"])  # this stage does not replace it


def test_an_error_raised_from_none_is_not_attributed_to_earlier_errors():
    """`raise ... from None` declares the earlier error irrelevant."""
    full = OSError(errno.ENOSPC, "No space left on device", "/elsewhere")
    for cause in ("from None", "", "from full"):
        try:
            exec(f"try:\n    raise full\nexcept OSError:\n    raise KeyError('a bug') {cause}", {"full": full})
        except KeyError as error:
            found = as_user_error(error)
            assert isinstance(found, KeyError if cause == "from None" else DiskError), cause


def test_a_user_file_next_to_the_checkpoints_is_not_a_checkpoint(tmp_path):
    """Deciding and reading use the same definition of a checkpoint."""
    made = record(tmp_path)
    made.begin(restart=True)
    place = tmp_path / "attention_tuning" / "checkpoints"
    place.mkdir(parents=True)
    for name in ("step-mine.ckpt", "step-00000009-.ckpt"):
        (place / name).write_bytes(b"x")
    assert next_action(config(), "attention_tuning", other(tmp_path)) == RESTART
    assert "good checkpoint" not in advice(place)
    (place / f"step-00000002-{'0' * 16}.ckpt").write_bytes(b"x")
    assert f"last good checkpoint, {place}/step-00000002" in advice(place)
    with pytest.raises(UserError, match="stage.steps: 6 -> 7"):
        next_action(config(), "attention_tuning", other(tmp_path))


def test_an_unwritable_directory_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file/run: part of the path is a file"):
        check_access(tmp_path / "file" / "run")


def test_insufficient_disk_space_is_reported_before_the_target_is_loaded(tmp_path, monkeypatch):
    from train import disk_space as space
    from train.context import Resources

    resources = Resources(config())
    check_disk(config(), resources, tmp_path, ["attention_tuning", "export"])
    monkeypatch.setattr(space, "free_bytes", lambda place: 6 * 10**6)
    with pytest.raises(UserError, match=r"6.0 MB free.*an additional \d.*checkpoints of a stage .*MB.*run_dir="):
        check_disk(config(), resources, tmp_path, ["attention_tuning", "export"])
    assert "target" not in vars(resources)


def test_insufficient_shared_memory_is_reported_before_the_workers_start(tmp_path, monkeypatch):
    from train import disk_space as space

    check_shared_memory(0, 10**9)
    monkeypatch.setattr(space, "free_bytes", lambda place: 32_000)
    with pytest.raises(UserError, match="runtime.workers=2: .* has only 32.0 kB free.*runtime.workers=0"):
        check_shared_memory(2, 100_000, tmp_path)


def test_deletion_errors_are_ignored_only_for_directories_that_can_be_made_again():
    """If a temporary directory or a damaged cache entry remains, the next use of its place fails anyway."""
    counts = {file.name: file.read_text().count("ignore_errors=True") for file in (ROOT / "src").rglob("*.py")}
    assert {name: count for name, count in counts.items() if count} == {
        "stages.py": 1,
        "tokenized.py": 3,
        "tables.py": 1,
    }


def test_overwrite_true_does_not_replace_weights_with_a_missing_record(tmp_path):
    made, _ = finished(tmp_path)
    made.done.unlink()
    with pytest.raises(UserError, match="overwrite=attention_tuning"):
        next_action(config(overwrite=True), "attention_tuning", made)
    assert next_action(config(overwrite="attention_tuning"), "attention_tuning", made) == RESTART


def test_a_missing_result_without_a_recorded_hash_is_detected(tmp_path):
    """Records of earlier versions have no hash of the exported config.json, which their evaluation changed."""
    made, weights = finished(tmp_path, "export", "model.safetensors")
    assert next_action(config(), "export", made) == RESTART
    (weights.parent / "config.json").write_text("{}")
    assert next_action(config(), "export", made) == FINISHED


@pytest.mark.slow
def test_a_hub_target_is_identified_by_its_commit(tmp_path):
    """The name may refer to another commit in a later stage."""
    cached = tmp_path / "hub" / "models--acme--tiny"
    (cached / "refs").mkdir(parents=True)
    commits = ["1" * 40, "3" * 40]
    for commit in commits:
        (cached / "snapshots" / commit).mkdir(parents=True)
        shutil.copy(ROOT / "src/data/tiny/target/config.json", cached / "snapshots" / commit)
    code = "from data.sources.hub_commit import commit_of; print(commit_of('acme/tiny', None))"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {
        key: value for key, value in environment.items() if key not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    }
    for commit in commits:
        (cached / "refs" / "main").write_text(commit)
        shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert shown.stdout.split()[-1:] == [commit], shown.stderr
