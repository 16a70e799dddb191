"""The file that travels with each drafter: plain transformers decodes with it, in a process without this project."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, random_draft
from transformers import AutoModelForCausalLM, GenerationConfig

from data.chat import ChatEncoder
from data.records import prompt
from data.sources import read_strictly
from models.custom_generate import generate as shipped
from models.decoding import generate
from models.draft import DraftModel
from models.export import export_draft, recommend
from models.selection import OFF, RELEASE, Selection
from models.target import load_target

sys.path.insert(0, str(ROOT / "scripts"))
from check_families import SIZES, random_pair

# What the other process runs: nothing of this project can be imported there.
ALONE = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("models", "train", "data"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
call = json.load(sys.stdin)
target = AutoModelForCausalLM.from_pretrained(call["target"], dtype=torch.float32)
given = {"custom_generate": call["drafter"], "trust_remote_code": True, "return_dict_in_generate": True}
answers = []
for prompts in call["batches"]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    output = target.generate(input_ids=ids, attention_mask=mask, **given, **call["arguments"])
    for row, gained in zip(output.sequences[:, longest:].tolist(), output.acceptance_lengths):
        answers.append([row, gained])
print(json.dumps(answers))
"""


def alone(target, drafter, batches, **arguments) -> list[tuple[list[int], list[int]]]:
    """New tokens and acceptance lengths of each prompt, by plain transformers in a process of its own."""
    call = {"target": str(target), "drafter": str(drafter), "batches": batches, "arguments": arguments}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps(call), capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    messages = read_strictly(str(TINY / "prompts.jsonl"), prompt, split="test", most=50, setting="data.prompts")
    encoder = ChatEncoder(tiny_tokenizer, {})
    return [encoder.prompt(m) for m in messages]


@pytest.fixture(scope="module")
def artifact(tiny_target, tmp_path_factory):
    """A drafter that is right now and then: the target's own projectors, some of them bent, and a calibrator."""
    torch.manual_seed(0)
    draft = DraftModel(tiny_target, num_layers=6, block_size=8, calibrator_rank=8)
    with torch.no_grad():
        for parameter in draft.calibrator_parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("drafter")
    export_draft(draft, directory, torch.float32)
    return draft, directory


def test_same_tokens_and_acceptance_as_our_own_decoder(tiny_target, prompts, artifact):
    draft, directory = artifact
    own = [generate(tiny_target, draft, [p], max_new_tokens=16, mode="sequential", selection=RELEASE) for p in prompts]
    other = alone(TINY / "target", directory, [[p] for p in prompts], max_new_tokens=16)
    assert [tokens for tokens, _ in other] == [result.tokens[0] for result in own]
    assert [gained for _, gained in other] == [[step.accepted + 1 for step in result.steps[0]] for result in own]
    lengths = {length for _, gained in other for length in gained}
    assert lengths > {1, 2}  # something was accepted, and not everything


def test_batches_selection_and_the_calibrator(tiny_target, prompts, artifact):
    """Rows of unequal length, padded on the left; other rules; without the calibrator."""
    draft, directory = artifact
    batch = sorted(prompts[:5], key=len)
    for rule, calibrate in ((Selection("min_confidence", 0.3), True), (OFF, False)):
        how = {"mode": "sequential", "selection": rule, "calibrate": calibrate}
        own = generate(tiny_target, draft, batch, max_new_tokens=24, **how)
        settings = {"selection": rule.rule, "threshold": rule.threshold, "calibrate": calibrate}
        other = alone(TINY / "target", directory, [batch], max_new_tokens=24, **settings)
        longest = max(map(len, own.tokens))
        padding = tiny_target.generation_config.pad_token_id
        assert [row for row, _ in other] == [tokens + [padding] * (longest - len(tokens)) for tokens in own.tokens]
        assert [gained for _, gained in other] == [[step.accepted + 1 for step in row] for row in own.steps]


def here(target, draft, directory, ids, **arguments):
    """The shipped function in this process, on a plain target."""
    export_draft(draft, directory, torch.float32)
    return shipped.generate(target, input_ids=ids, drafter=str(directory), **arguments)


def plain(target, tmp_path, implementation="sdpa"):
    """The same weights as transformers loads them by itself."""
    target.save_pretrained(tmp_path / "target")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "target", attn_implementation=implementation)


# Mask blocks here have masks of their own, made another way than ours: so windows and RoPE are compared as well.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "gemma 3", "phi 4 mini", "qwen3 moe", "olmo 2"])
def test_every_family_drafts_as_ours_does(family, implementation, tmp_path):
    target, _ = random_pair(family)
    draft = DraftModel(target, num_layers=3, block_size=6, calibrator_rank=0)  # near the target: some are accepted
    twin = plain(target, tmp_path, implementation)
    for length in (3, 30):
        ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))
        own = generate(target, draft, ids, max_new_tokens=24, mode="sequential", selection=OFF)
        arguments = {"max_new_tokens": 24, "selection": "off", "return_dict_in_generate": True}
        found = here(twin, draft, tmp_path / "drafter", ids, **arguments)
        answer = twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert torch.equal(found.sequences, answer)
        assert found.sequences[0, length:].tolist() == own.tokens[0]
        assert found.acceptance_lengths[0] == [step.accepted + 1 for step in own.steps[0]]


def test_a_file_of_settings_is_followed(tiny_target, prompts, artifact, tmp_path):
    """What the evaluation found goes for whoever decodes with the artifact."""
    draft, _ = artifact
    export_draft(draft, tmp_path, torch.float32)
    recommend(tmp_path, {"parallel_rows": 0, "selection": "off", "threshold": 0.0, "calibrate": False})
    own = generate(
        tiny_target, draft, prompts[:1], max_new_tokens=24, mode="sequential", selection=OFF, calibrate=False
    )
    ((_, gained),) = alone(TINY / "target", tmp_path, [prompts[:1]], max_new_tokens=24)
    assert gained == [step.accepted + 1 for step in own.steps[0]]


def test_samples_are_distributed_as_the_targets(tmp_path):
    """Two tokens, 1,500 draws, against the exact joint distribution: chi-square with 5% of the cells' mass pooled."""
    target = load_target(None, architecture=SIZES | {"model_type": "qwen3", "vocab_size": 6, "eos_token_id": None})
    draft = DraftModel(target, num_layers=3, block_size=3, calibrator_rank=0)
    twin, ids, count = plain(target, tmp_path), torch.tensor([[3, 4, 5]]), 1500
    expected = {}
    with torch.no_grad():
        first = (twin(ids).logits[0, -1] / 0.8).softmax(-1)
        for a in range(6):
            second = (twin(torch.cat([ids, torch.tensor([[a]])], 1)).logits[0, -1] / 0.8).softmax(-1)
            expected |= {(a, b): float(first[a] * second[b]) * count for b in range(6)}
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.8, "selection": "off"}
    batch = ids.repeat(count, 1)
    found = here(twin, draft, tmp_path / "drafter", batch, return_dict_in_generate=True, **arguments)
    assert any(length > 1 for gained in found.acceptance_lengths for length in gained)
    drawn = [tuple(row) for row in found.sequences[:, 3:5].tolist()]
    cells = [(drawn.count(pair), mean) for pair, mean in expected.items() if mean >= 5]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    bound = len(cells) + 4 * (2 * len(cells)) ** 0.5  # four standard deviations above the mean
    assert statistic < bound


def test_what_it_cannot_do_is_refused(tmp_path, artifact):
    target, draft = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    settings = {"num_beams": 2, "exponential_decay_length_penalty": (1, 3.0), "position_ids": ids}
    with pytest.raises(ValueError, match="exponential_decay_length_penalty, num_beams, position_ids"):
        here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="does not follow streamer"):
        here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=4, streamer=object())
    with pytest.raises(ValueError, match="num_target_layers=8, but this model has 5"):
        shipped.generate(twin, input_ids=ids, drafter=str(artifact[1]), max_new_tokens=4)
    with pytest.raises(ValueError, match="Where is the drafter"):
        shipped.generate(twin, input_ids=ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="expected off, cumulative_product or min_confidence"):
        here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=4, selection="best")


def test_the_target_is_left_as_it_was(tmp_path):
    target, _ = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    here(twin, random_draft(target), tmp_path / "drafter", ids, max_new_tokens=8)
    assert twin.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    assert all(layer.self_attn.is_causal for layer in twin.model.layers)
    assert twin.config._attn_implementation == "sdpa"


def test_blocks_do_not_take_longrope_beyond_its_change(tmp_path):
    target, draft = random_pair("phi 4 mini")  # changes behind 128 positions
    twin, ids = plain(target, tmp_path), torch.full((1, 100), 5)
    here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=16)
    with pytest.raises(ValueError, match="100 tokens and 17 new ones, .* pass position 128"):
        here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=17)


def test_settings_come_from_the_call_then_its_config_then_the_models(tmp_path):
    target, draft = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    twin.generation_config.eos_token_id = None
    config = GenerationConfig(max_new_tokens=9)
    assert here(twin, draft, tmp_path / "drafter", ids, generation_config=config).shape[1] == 12
    assert here(twin, draft, tmp_path / "drafter", ids, generation_config=config, max_new_tokens=4).shape[1] == 7
    first = int(here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=1)[0, 3])
    twin.generation_config.eos_token_id = [first]
    assert here(twin, draft, tmp_path / "drafter", ids, generation_config=config).shape[1] == 4


def test_defaults_are_those_of_generate(tmp_path):
    """20 new tokens, the 50 most likely ones when sampling, penalties for repetition."""
    target, draft = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    twin.generation_config.eos_token_id = None
    assert here(twin, draft, tmp_path / "drafter", ids).shape[1] == 23
    probable = twin(ids).logits[0, -1].topk(50).indices.tolist()
    drawn = here(
        twin, draft, tmp_path / "drafter", ids.repeat(400, 1), max_new_tokens=1, do_sample=True, temperature=9.0
    )
    assert set(drawn[:, 3].tolist()) <= set(probable)
    how = {"max_new_tokens": 20, "repetition_penalty": 1.5, "do_sample": False}
    found = here(twin, draft, tmp_path / "drafter", ids, **how)
    assert torch.equal(found, twin.generate(ids, attention_mask=torch.ones_like(ids), **how))


def test_a_drafter_is_read_again_when_something_has_changed(tmp_path):
    target, draft = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=4)
    known = twin._flexdraft[1]
    shipped.generate(twin, input_ids=ids, drafter=str(tmp_path / "drafter"), max_new_tokens=4)
    assert twin._flexdraft[1] is known
    recommend(tmp_path / "drafter", {"parallel_rows": 0, "selection": "off", "threshold": 0.0, "calibrate": False})
    for changed in (lambda: None, twin.double):
        changed()
        shipped.generate(twin, input_ids=ids, drafter=str(tmp_path / "drafter"), max_new_tokens=4)
        assert twin._flexdraft[1] is not known
        known = twin._flexdraft[1]
