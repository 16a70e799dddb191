"""`trainer.deterministic=true`: every operation has a deterministic algorithm on a GPU."""

import re

import pytest
import torch
from helpers.shared import random_draft, random_target
from helpers.training import data, module, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TopPLogitsWarper

from models.acceptance import running_product
from models.decoding.flex import generate
from models.decoding.sampling import Sampling
from models.decoding.selection import RULES, Selection
from models.loss.objectives import Objective, dpace_weights
from train.loop.modules import AttentionTuning, BonusCalibration


def raising() -> dict[str, str]:
    """Return ATen name -> condition for the operations that raise on a GPU, from PyTorch's documentation."""
    text, _, _ = torch.use_deterministic_algorithms.__doc__.partition("In addition")
    text = text[text.index("normally-nondeterministic operations will throw") :]
    found = re.findall(r"\* :(?:class|func):`([\w.]+)`(.*?)(?=\n\s*\* :|\Z)", text, re.S)
    return {aten_name(name.rpartition(".")[2]): " ".join(when.split()) for name, when in found}


def aten_name(name: str) -> str:
    """Convert a class name to its ATen name: `NLLLoss` -> `nll_loss`."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return {"interpolate": "upsample", "grid_sample": "grid_sampler"}.get(name, split.lower().strip("_"))


class Watch(TorchDispatchMode):
    """Record every executed operation, including the backward pass and the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = raising()
        self.seen: set[str] = set()
        self.bad: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__.strip("_")
        self.seen.add(name)
        if self.raises(name, args):
            self.bad.add(str(func))
        return func(*args, **(kwargs or {}))

    def raises(self, name: str, args) -> bool:
        if name == "cumprod":  # not on the list, but the same kind of kernel
            return args[0].is_floating_point()
        for listed, when in self.listed.items():
            if name != listed and not name.startswith(f"{listed}_"):
                continue
            if "floating point" in when:
                return args[0].is_floating_point() or args[0].is_complex()
            return "quantized" not in when or args[0].is_quantized
        return False


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_list_of_operations_matches_the_pytorch_documentation():
    listed = raising()
    assert {"cumsum", "put", "histc", "bincount", "median", "scatter_reduce", "nll_loss", "ctc_loss"} <= listed.keys()
    assert len(listed) > 20 and "floating point" in listed["cumsum"]
    watch = Watch()
    with watch:
        torch.rand(3).cumsum(0)
        torch.arange(3).cumsum(0)
        torch.nn.functional.nll_loss(torch.rand(2, 3), torch.tensor([0, 1]))
        torch.rand(3).median(0)
    assert sorted(name.split(".")[1] for name in watch.bad) == ["cumsum", "median", "nll_loss_forward"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["dpace", "decay", "flat"])
@pytest.mark.parametrize("stage", [AttentionTuning, BonusCalibration])
def test_training_and_validation_use_no_nondeterministic_operation(stage, weights, tmp_path, deterministic):
    training = module(stage, random_target(), beyond=True)
    training.objective = Objective(weights=weights, kl=0.5, tv=0.5)
    fitted = trainer(tmp_path, 2, deterministic=True, val_check_interval=1, check_val_every_n_epoch=None)
    with Watch() as watch:
        fitted.fit(training, data(2))
    assert fitted.global_step == 2 and {"mm", "scatter_add"} <= watch.seen and not watch.bad


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_decoding_with_sampling_and_selection_uses_no_nondeterministic_operation(mode, rule, deterministic):
    target = random_target()
    draft, sampling = random_draft(target), Sampling(temperature=0.7, top_k=30, top_p=0.9)
    with Watch() as watch, torch.no_grad():
        prompts = [[3, 4, 5], [6, 7, 8, 9, 10]]
        generate(
            target, draft, prompts, max_new_tokens=8, mode=mode, selection=Selection(rule, 0.01), sampling=sampling
        )
    assert "searchsorted" in watch.seen and not watch.bad


def test_deterministic_replacements_equal_the_operations_they_replace():
    torch.manual_seed(0)
    confidence, lengths = torch.rand(50, 15, dtype=torch.float64), torch.randint(0, 16, (50, 1))
    supervised = torch.arange(15) < lengths
    assert torch.allclose(running_product(confidence), confidence.cumprod(-1))
    reach = torch.where(supervised, 0.5 * confidence + 0.5, 0.0).cumprod(-1)
    expected = reach.flip(-1).cumsum(-1).flip(-1) * supervised
    assert torch.allclose(dpace_weights(confidence, supervised, 0.5), expected)
    logits = 3 * torch.randn(200, 97, dtype=torch.float64)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        assert Sampling(1.0, top_p=top_p)._most_likely(None, logits).equal(TopPLogitsWarper(top_p)(None, logits))
