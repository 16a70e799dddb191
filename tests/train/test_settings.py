"""Every setting of conf/ accepts its valid values; others fail with one line, before a target is loaded."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.calls import CALLS
from helpers.shared import ROOT
from lightning.fabric.accelerators import MPSAccelerator
from lightning.pytorch.trainer.connectors import accelerator_connector
from omegaconf import ListConfig, OmegaConf

from data.config.compose import composed
from data.config.ranges import LISTS, RANGES
from data.config.validate import FREE_FORM, NULLABLE, check_settings
from data.errors import UserError
from models.decoding.selection import RULES
from train import names
from train.plan.estimate import machine_of
from train.settings import checks
from train.settings.derived import accelerator, arithmetic, device, device_count, devices

EXPERIMENTS = {name: (f"+experiment={name}",) for name in ("tiny", "qwen3_8b")}
EXPERIMENTS["lora"] = ("+experiment=tiny", "adapter=lora")
HUGE = 10**30
WRONG = ("", "[/old]", "${nowhere}", -1, 0, HUGE, 1e30, math.nan, True, None, [], [HUGE], {"a": 1})


def leaves(tree, path=""):
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}.{key}" if path else key).items()}


def known(*overrides):
    return leaves(OmegaConf.to_container(composed([*overrides, "name=any"]), resolve=False))


def free(key):
    """Whether a class or library checks a setting itself."""
    return any(key == one or key.startswith(f"{one}.") for one in FREE_FORM)


@pytest.fixture
def checked(monkeypatch):
    """The configuration of a command, after all checks that precede loading."""

    def check(*overrides, given=None):
        task = SimpleNamespace(overrides=SimpleNamespace(task=list(overrides)))
        monkeypatch.setattr(checks, "HydraConfig", SimpleNamespace(get=lambda: task))
        config = given or composed(list(overrides))
        checks.check_config(config)
        return config

    return check


def test_every_number_in_conf_has_a_range_and_every_null_a_type():
    everything = known() | known("adapter=lora") | known("trainer=zero2") | known("logger=wandb")
    numbers = {key for key, value in everything.items() if isinstance(value, int | float) and type(value) is not bool}
    launched = {"trainer.devices", "trainer.strategy.stage"}  # train/settings/trainer.py
    assert numbers - launched == RANGES.keys() - {key for key in RANGES if everything.get(key, 0) is None}
    lists = {key for key, value in everything.items() if isinstance(value, list) and type(value[0]) is not str}
    assert lists == LISTS.keys()
    nulls = {key for key, value in everything.items() if value is None}
    assert {key for key in nulls if not free(key)} <= NULLABLE.keys() <= everything.keys()
    assert names.SELECTIONS == RULES


def with_value(config, key, value):
    changed = config.copy()
    OmegaConf.update(changed, key, value, merge=False)
    return changed


@pytest.mark.slow
def test_a_number_out_of_its_range_is_refused(checked):
    fresh = composed(["+experiment=tiny", "adapter=lora"])
    OmegaConf.set_struct(fresh, False)
    for key, limits in RANGES.items():
        outside = [limits.low - 1, -HUGE, HUGE if limits.integer else math.inf, math.nan, "many", True, [1], {"a": 1}]
        outside += [limits.low] if limits.above else []
        outside += [limits.high + 1] if limits.high < HUGE else []
        outside += [0.5] if limits.integer else []
        outside += [] if key in NULLABLE else [None]
        for value in outside:
            with pytest.raises(UserError, match=key.replace(".", "[.]")):
                checked("+experiment=tiny", "adapter=lora", given=with_value(fresh, key, value))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_any_value_of_a_setting_works_or_fails_in_one_line(experiment, checked):
    start, others = EXPERIMENTS[experiment], known(*EXPERIMENTS["tiny"])
    fresh = composed(list(start))
    OmegaConf.set_struct(fresh, False)
    for key, value in known(*start).items():
        if key.startswith("hydra") or experiment != "tiny" and key in others:
            continue
        for wrong in WRONG:
            config = with_value(fresh, key, wrong)
            try:
                checked(*start, given=config)
            except UserError as error:
                assert key.split(".")[0] in str(error) or "push to" in str(error), (key, wrong, error)
                assert len(str(error).splitlines()) <= 3
                continue
            if free(key) or value is None or "${" in str(value):
                continue
            found = OmegaConf.select(config, key)  # accepted: with the right type
            kind = (int, float) if isinstance(value, float) else type(value)
            assert found is None and key in NULLABLE or isinstance(found, ListConfig if kind is list else kind), (
                key,
                wrong,
                found,
            )


@pytest.mark.slow
def test_no_setting_can_be_deleted_and_none_added(checked):
    fresh = composed(["+experiment=tiny", "adapter=lora"])
    OmegaConf.set_struct(fresh, False)
    for key in known("+experiment=tiny", "adapter=lora"):
        if not key.startswith("hydra") and not free(key):
            without, (group, _, name) = fresh.copy(), key.rpartition(".")
            del (OmegaConf.select(without, group) if group else without)[name]
            with pytest.raises(UserError):
                checked("+experiment=tiny", "adapter=lora", given=without)
    for group in ("logger", "stage", "adapter", "stage.evaluate.speed"):
        with pytest.raises(UserError):
            checked("+experiment=tiny", f"~{group}")
    for group in ("", "stage.", "stage.evaluate.speed.", "adapter.", "objective.", "runtime.", "trainer."):
        with pytest.raises(UserError, match=f"{group}nothing"):
            checked("+experiment=tiny", "adapter=lora", f"+{group}nothing=1")


@pytest.mark.slow
@pytest.mark.parametrize("name, found", [("1", "1"), ("${seed}", "0"), ("0.5", "0.5"), ("true", "True"), ("v1", "v1")])
def test_a_number_is_accepted_as_a_name(name, found, checked):
    config = checked("+experiment=tiny", f"name={name}")
    assert config.name == found and config.run_dir == f"checkpoints/{found}"


NO_EFFECT = (
    "stage.evaluate.top_k=5",
    "stage.evaluate.top_p=0.5",
    "stage.evaluate.threshold=0.5 stage.evaluate.selection=off",
    "objective.gamma=7",
    "objective.alpha=0.1 objective.weights=flat",
    "objective.temperature=2",
    "stage.attention_tuning.module.bonus_slot_fraction=0.2",
    "stage.bonus_calibration.module.bonus_slot_fraction=0.2",
    "stage.bonus_calibration.best_by=val/tau_estimate data.validation_records=0",
    "stage.bonus_calibration.patience=1 data.validation_records=0",
    "export.tag=v1",
    "export.private=false",
    "regenerate.temperature=1",
    "hardware.gpu=l40s",
    "data.prompts=mine.jsonl benchmarks=paper",
    "model.target.revision=main",
    "model.target.revision=main model.target.name=null",
    "+trainer.benchmark=true",
    "+trainer={{benchmark:true}}",
    "stage.evaluate={{top_k:5}}",
    "stage.evaluate.speed={{thresholds:[0.5]}} stage.evaluate.selection=off",
    "stage.attention_tuning.patience=3",
    "stage.bonus_calibration.patience=2 stage.bonus_calibration.validate_every=1000",
    "trainer=zero3 runtime.compile=true",
)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", NO_EFFECT)
def test_an_override_without_effect_is_refused(overrides, checked):
    overrides = overrides.format(root=ROOT)
    first = overrides.split()[-1 if overrides.startswith("trainer=") else 0].split("=")[0].lstrip("+")
    first = first if ":" not in overrides.split()[0] or "path" in overrides else f"{first}."
    with pytest.raises(UserError, match=f"{first}.*(has no effect|validation is disabled)"):
        checked("+experiment=tiny", *overrides.split())


@pytest.mark.slow
def test_an_override_with_an_effect_is_accepted(checked):
    for overrides in (
        "stage.evaluate.top_k=5 stage.evaluate.temperature=1",
        "objective.gamma=7 objective.weights=decay",
        "objective.temperature=2 objective=kl",
        "hardware.gpu=l40s plan=true trainer=gpu",
        "+recipe=beyond stage.attention_tuning.module.bonus_slot_fraction=0.2",
        "data.validation_records=0",
        "data.split=test data.path=[src,owner/name]",
        "data.split=test data.path=owner/name",
        "data.prompts=mine.jsonl",
        "data.prompts=mine.jsonl benchmarks=paper +benchmarks.mine.path=${data.prompts}",
        "model.target.revision=main model.target.name=owner/name",
        "stage.attention_tuning.patience=2",
        "stage.bonus_calibration.patience=9 stages=[attention_tuning]",
    ):
        checked("+experiment=tiny", *overrides.split())


@pytest.mark.slow
@pytest.mark.parametrize("available", ["none", "cuda", "mps"])
@pytest.mark.parametrize("chosen", ["auto", "cpu", "cuda", "mps", "gpu"])
def test_export_and_evaluation_use_the_device_that_lightning_trains_on(available, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available == "cuda"))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: available == "mps"))
    config = composed(["+experiment=tiny", "name=any", f"trainer.accelerator={chosen}"])
    connector = accelerator_connector._AcceleratorConnector
    if chosen == "auto":
        expected = connector._choose_auto_accelerator()
    elif chosen == "gpu" and available != "none":
        expected = connector._choose_gpu_accelerator_backend()
    else:
        expected = {"gpu": "cuda"}.get(chosen, chosen)
    assert accelerator(config) == device(config) == expected
    if expected == "mps" and chosen != "gpu":
        with pytest.raises(UserError, match="Apple"):
            machine_of(config)
    else:
        assert (machine_of(config).gpu is None) == (expected == "cpu")


FORMS = {"1": 1, "2": 2, "'2'": 2, "-1": -1, "'-1'": -1, "auto": -1, "[0,1]": [0, 1], "'0,1'": [0, 1], "'3,'": [3]}


@pytest.mark.parametrize("form", FORMS)
def test_all_of_lightnings_forms_of_devices_are_accepted(form, checked):
    from lightning.fabric.utilities.device_parser import _normalize_parse_gpu_string_input as lightnings

    config = checked(
        "+experiment=qwen3_8b",
        "plan=true",
        "stage.attention_tuning.global_batch_size=24",
        "stage.bonus_calibration.global_batch_size=24",
        f"trainer.devices={form}",
    )
    assert devices(config) == FORMS[form]
    if form != "auto":
        given = config.trainer.devices
        assert lightnings(given if isinstance(given, int | str) else list(given)) == FORMS[form]
    count = 8 if FORMS[form] == -1 else FORMS[form] if isinstance(FORMS[form], int) else len(FORMS[form])
    assert device_count(config, 8) == machine_of(config).ranks == count
    assert device(config) == {"'3,'": "cuda:3"}.get(form, "cuda:0" if isinstance(FORMS[form], list) else "cuda")


@pytest.mark.parametrize("form", ["0", "-2", "x", "[]", "[0,0]", "[-1]", "'0,x'", "0.5", "true", "{a: 1}"])
def test_devices_that_lightning_rejects_are_refused(form, checked):
    with pytest.raises(UserError, match="trainer[.]devices"):
        checked("+experiment=qwen3_8b", f"trainer.devices={form}")


@pytest.mark.slow
def test_lightnings_short_names_of_precisions_are_accepted(checked):
    names = {"32": "float32", "'32'": "float32", "32-true": "float32", "null": "float32", "bf16": "bfloat16"}
    for name, dtype in (names | {"bf16-mixed": "bfloat16"}).items():
        assert arithmetic(checked("+experiment=tiny", f"trainer.precision={name}")) == dtype
    for name in ("16", "64", "bf16-true", "[32]", "true"):
        with pytest.raises(UserError, match="trainer[.]precision"):
            checked("+experiment=tiny", f"trainer.precision={name}")


@pytest.mark.parametrize("argument", ["fast_dev_run=true", "overfit_batches=1", "limit_val_batches=0", "foo=1"])
def test_arguments_of_the_trainer_that_are_not_supported_are_refused(argument, checked):
    with pytest.raises(UserError, match=f"trainer.{argument.split('=')[0]}.*Remove it"):
        checked("+experiment=tiny", f"+trainer.{argument}")


def test_allowed_trainer_arguments_are_arguments_of_lightnings_trainer():
    from inspect import signature

    from lightning import Trainer

    from train.settings.trainer import ARGUMENTS

    assert ARGUMENTS.keys() - {"_target_"} < signature(Trainer).parameters.keys()


@pytest.mark.slow
def test_calls_refused_from_their_settings_alone_need_no_target(checked):
    refused = 0
    for name, (overrides, words) in CALLS.items():
        start = [] if name in ("no experiment", "unknown experiment") else ["+experiment=tiny"]
        try:
            checked(*start, *overrides)
        except UserError as error:
            refused += 1
            assert all(word in str(error) for word in words), (name, error)
    assert refused > 30


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stage.attention_tuning.rows_per_step=4", "stage.attention_tuning.global_batch_size"),
        ("stage.bonus_calibration.module.told_share=0.5", "stage.bonus_calibration.module.bonus_slot_fraction"),
        ("data.row_length=512", "data.max_seq_len"),
        ("+speed.recompute=true", "runtime"),
        ("speed.compile=true", "runtime"),
        ("+speed={compile: true}", "runtime"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(UserError, match=f"^[a-z_.0-9]+: this setting was renamed to {new}"):
        overrides = ["+experiment=tiny", old]
        check_settings(composed(overrides), overrides)
