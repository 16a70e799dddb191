"""Every experiment and preset composes, is valid, and can be instantiated."""

import copy
import functools
import operator

import pytest
from helpers.configs import CONF, composed
from helpers.shared import command
from hydra.utils import get_class
from omegaconf import OmegaConf

import train.__main__  # noqa: F401  registers the `root` resolver
from data.config import compose
from data.config.compose import GROUPS
from data.config.validate import check_finite
from data.errors import UserError
from train.loop.fit import build_trainer

STAND_IN = ("steps=3", "global_batch_size=2", "decode.prompts=2", "decode.max_new_tokens=8")


@pytest.mark.slow(but="[qwen3_8b]")
@pytest.mark.parametrize("experiment", sorted(f.stem for f in (CONF / "experiment").glob("*.yaml")))
def test_experiments_compose_and_name_classes_that_exist(experiment):
    config = composed(f"+experiment={experiment}")
    assert config.name == experiment
    for stage in ("attention_tuning", "bonus_calibration"):
        get_class(config.stage[stage].module._target_)
        assert config.stage[stage].module.steps == config.stage[stage].steps


def settings(*overrides):
    return OmegaConf.to_container(composed(*overrides), resolve=True)


def test_the_defaults_are_the_recipe_of_the_paper_for_any_target():
    target = "model.target.name=owner/mine"
    assert settings("name=mine", target, "logger=wandb") == settings(
        "+experiment=qwen3_8b", "name=mine", "model=custom", target
    )
    assert OmegaConf.is_missing(composed("name=mine").model.target, "name")


def test_tiny_sets_only_what_differs_from_the_defaults():
    tiny = OmegaConf.load(CONF / "experiment" / "tiny.yaml")
    defaults = composed("name=any", "data=tiny", "model=tiny", "trainer=cpu")
    paths = {".".join(key for key in keys if isinstance(key, str)) for keys, _ in leaves(OmegaConf.to_container(tiny))}
    depends_on_the_machine = "trainer.precision"
    for path in sorted(path for path in paths - {depends_on_the_machine} if not path.startswith("defaults.")):
        assert OmegaConf.select(tiny, path) != OmegaConf.select(defaults, path), path


def test_a_group_is_a_folder_and_base_files_are_no_choice():
    assert set(GROUPS) == {file.parent.name for file in CONF.glob("*/*.yaml")}
    bases = list(CONF.glob("*/_*.yaml"))
    assert bases
    for base in bases:
        with pytest.raises(UserError, match=f"^{base.parent.name}=nowhere: expected one of [a-z]") as raised:
            compose.composed(["+experiment=tiny", f"{base.parent.name}=nowhere"])
        assert base.stem not in str(raised.value) and "\n" not in str(raised.value)


def leaves(tree, path=()):
    """Yield (keys, value) of every scalar setting."""
    if not isinstance(tree, dict | list):
        return [(path, tree)]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [leaf for key, value in pairs for leaf in leaves(value, (*path, key))]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_number_of_any_setting_may_be_infinite_or_nan(value):
    given = OmegaConf.to_container(composed("+experiment=tiny", "adapter=lora"), resolve=False)
    check_finite(given)
    numbers = [keys for keys, known in leaves(given) if isinstance(known, int | float) and not isinstance(known, bool)]
    assert len(numbers) > 80
    for *groups, last in numbers:
        changed = copy.deepcopy(given)
        functools.reduce(operator.getitem, groups, changed)[last] = value
        with pytest.raises(UserError, match=f"{last}.*={value}: expected a finite number"):
            check_finite(changed)


@pytest.mark.parametrize("preset", sorted(f.stem for f in (CONF / "trainer").glob("*.yaml")))
def test_trainer_presets_build(preset, tmp_path):
    cpu = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"]
    trainer = build_trainer(composed("+experiment=tiny", f"trainer={preset}", *cpu), "attention_tuning", tmp_path)
    assert trainer.max_steps > 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_experiment_runs_on_a_stand_in(tmp_path):
    done = command(
        "+experiment=qwen3_8b",
        "model=stand_in",
        "data=tiny",
        "trainer=cpu",
        "logger=wandb",
        *(f"stage.{s}.{k}" for s in ("attention_tuning", "bonus_calibration") for k in STAND_IN),
        "data.max_records=100",
        "data.validation_records=8",
        "stage.evaluate.num_prompts=2",
        "stage.evaluate.max_new_tokens=20",
        "stage.evaluate.speed={num_prompts: 1, batch_sizes: [1], thresholds: [0.01], repeats: 1}",
        "export.dtype=float32",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "lossless: 2/2 prompts identical" in done.stdout
    assert list((tmp_path / "checkpoints/qwen3_8b/wandb").glob("offline-run-*"))
