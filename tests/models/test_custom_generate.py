"""The decoder file in each export: plain transformers decodes with it, in a process without this project."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from check_families import FAMILIES, random_pair
from helpers.hub_server import Repository, hub_server
from helpers.shared import TINY, random_draft
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from data.preprocess.chat_template import ChatEncoder
from data.sources.readers import read_strictly
from data.sources.records import prompt
from models.custom_generate import generate as shipped
from models.decoding.flex import generate
from models.decoding.reference import draft_logits
from models.decoding.selection import OFF, RELEASE, Selection, drafts_and_confidence
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export import artifact_io as export
from models.export.artifact_io import export_draft
from models.export.recommendation import recommend
from models.hf_cache import forward_cached

# Script of the other process, which cannot import this project.
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Decode with plain transformers in a separate process. Return new tokens and acceptance lengths per prompt."""
    home = {"HF_HOME": str(tmp_path_factory.mktemp("home"))}  # where transformers copies the shipped file

    def decode(target, drafter, batches, environment=None, **arguments) -> list[tuple[list[int], list[int]]]:
        call = {"target": str(target), "drafter": str(drafter), "batches": batches, "arguments": arguments}
        process = {"text": True, "capture_output": True, "timeout": 300, "cwd": "/"}
        environment = os.environ | home | (environment or {})
        done = subprocess.run([sys.executable, "-c", ALONE], input=json.dumps(call), env=environment, **process)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return decode


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    messages = read_strictly(str(TINY / "prompts.jsonl"), prompt, split="test", limit=50, setting="data.prompts")
    encoder = ChatEncoder(tiny_tokenizer, {})
    return [encoder.prompt(m) for m in messages]


@pytest.fixture(scope="module")
def artifact(request, tiny_target, tmp_path_factory):
    """Export a drafter that is sometimes right: the target's own projectors, partly perturbed, and a calibrator;
    optionally with the extensions `beyond` the paper."""
    torch.manual_seed(0)
    beyond = getattr(request, "param", "plain") == "beyond"
    extras = {"bonus_slot": beyond, "chain_rank": 4 * beyond}
    draft = DraftModel(tiny_target, DraftConfig(num_layers=6, block_size=8, calibrator_rank=8, **extras))
    with torch.no_grad():
        for name, parameter in draft.own_parameters().items():
            if name.startswith(("anchor_bias_mlp", "chain_mlp", "bonus_slot")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("drafter")
    export_draft(draft, directory, torch.float32)
    return draft, directory


BOTH = pytest.mark.parametrize("artifact", ["plain", "beyond"], indirect=True)


@pytest.mark.slow
@BOTH
def test_tokens_and_acceptance_equal_those_of_the_projects_decoder(alone, tiny_target, prompts, artifact):
    draft, directory = artifact
    own = [generate(tiny_target, draft, [p], max_new_tokens=16, mode="sequential", selection=RELEASE) for p in prompts]
    other = alone(TINY / "target", directory, [[p] for p in prompts], max_new_tokens=16)
    assert [tokens for tokens, _ in other] == [result.tokens[0] for result in own]
    assert [gained for _, gained in other] == [[step.accepted + 1 for step in result.steps[0]] for result in own]
    lengths = {length for _, gained in other for length in gained}
    assert lengths > {1, 2}  # some drafts were accepted, but not all


@pytest.mark.slow
@BOTH
def test_batches_selection_and_the_calibrator(alone, tiny_target, prompts, artifact):
    """Rows of different lengths, padded on the left; other selection rules; without the calibrator."""
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
    """Call the shipped function in this process on a plain target."""
    export_draft(draft, directory, torch.float32)
    return shipped.generate(target, input_ids=ids, drafter=str(directory), **arguments)


def plain(target, tmp_path, implementation="sdpa"):
    """Load the same weights with plain transformers."""
    target.save_pretrained(tmp_path / "target")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "target", attn_implementation=implementation, dtype="auto")


# The shipped decoder builds masks and RoPE differently, so lengths on both sides of the window of 9 are compared.
# "ours": our attention function does not accept transformers' masks, and neither does flash attention.
@pytest.mark.slow(but="[qwen3-sdpa]")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_drafts_as_in_the_projects_decoder(family, implementation, tmp_path):
    target, _ = random_pair(family)
    draft = random_draft(target, bonus_slot=True, chain_rank=4)
    twin = target if implementation == "ours" else plain(target, tmp_path, implementation)
    export_draft(draft, tmp_path / "drafter", torch.float32)
    drafter, given = shipped.Drafter(twin, tmp_path / "drafter"), twin.config._attn_implementation
    used = {layer.self_attn.config._attn_implementation for layer in drafter.layers}
    assert used == {implementation.replace("ours", "sdpa")}
    for length in (1, 4, 9, 10, 30):
        ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))
        cache = DynamicCache()
        forward_cached(twin, ids, cache)
        for calibrate in (False, True):
            logits = draft_logits(draft, cache, length, torch.tensor([7]), calibrate=calibrate)
            expected, sure = drafts_and_confidence(logits[1:])
            drafts, confidence = drafter.block(cache, length, 7, calibrate)
            assert drafts == expected.tolist() and torch.allclose(confidence, sure, atol=1e-5)
            assert all(layer.keys.shape[2] == layer.values.shape[2] == length for layer in cache.layers)
    own = twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    assert torch.equal(shipped.generate(twin, inputs=ids, drafter=str(tmp_path / "drafter"), max_new_tokens=24), own)
    assert twin.config._attn_implementation == given


@pytest.mark.slow
def test_a_recommendation_file_is_applied(alone, tiny_target, prompts, artifact, tmp_path):
    """The evaluation's recommendation is the default when decoding with the export."""
    draft, _ = artifact
    export_draft(draft, tmp_path, torch.float32)
    recommend(tmp_path, {"parallel_rows": 0, "selection": "off", "threshold": 0.0, "calibrate": False})
    own = generate(
        tiny_target, draft, prompts[:1], max_new_tokens=24, mode="sequential", selection=OFF, calibrate=False
    )
    ((_, gained),) = alone(TINY / "target", tmp_path, [prompts[:1]], max_new_tokens=24)
    assert gained == [step.accepted + 1 for step in own.steps[0]]


@pytest.mark.slow
def test_a_drafter_is_downloaded_from_the_hub_by_id(alone, prompts, artifact, tmp_path):
    _, exported = artifact
    directory = shutil.copytree(exported, tmp_path / "recommended")
    recommend(directory, {"parallel_rows": 0, "selection": "off", "threshold": 0.0, "calibrate": False})
    files = {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    with hub_server() as hub:
        hub.repositories["owner/flex-draft.1"] = Repository(private=True, commits={"1" * 40: files})
        environment = hub.environment(tmp_path)
        found = alone(TINY / "target", "owner/flex-draft.1", [prompts[:1]], environment, max_new_tokens=16)
    assert found == alone(TINY / "target", directory, [prompts[:1]], max_new_tokens=16)
    assert [*tmp_path.glob("**/snapshots/*/recommended_decoding.json")]


SAMPLED = {"do_sample": True, "temperature": 0.7}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},  # with transformers' default top_k
        {**SAMPLED, "top_k": 0},
        {**SAMPLED, "top_k": 20, "top_p": 0.9},
        {**SAMPLED, "min_p": 0.05, "min_new_tokens": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_same_seed_gives_the_same_tokens_as_plain_generate(settings, prompts, artifact, tmp_path):
    """The samples are the same draws, so they follow the target's distribution."""
    _, directory = artifact
    twin, gained = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.float32), []
    settings = {"max_new_tokens": 24, "return_dict_in_generate": True, **settings}
    for seed, tokens in enumerate(prompts[:6]):
        ids = torch.tensor([tokens])
        arguments = {"attention_mask": torch.ones_like(ids), **settings}
        torch.manual_seed(seed)
        own = twin.generate(ids, **arguments).sequences
        torch.manual_seed(seed)
        found = shipped.generate(twin, inputs=ids, drafter=str(directory), **arguments)
        assert torch.equal(found.sequences, own)
        gained += found.acceptance_lengths[0]
    assert {1, 2} < set(gained) | {0}  # some drafts were accepted, some rejected


def test_rows_end_at_stop_tokens_in_any_position_of_a_step(tmp_path, monkeypatch):
    """As first token, as bonus token, within the drafts; and in a batch of such rows, padded on the left."""
    target, draft = random_pair("qwen3")
    twin, generator, ends, answer = plain(target, tmp_path), torch.Generator().manual_seed(0), set(), []
    twin.generation_config.eos_token_id = None
    export_draft(draft, tmp_path / "drafter", torch.float32)

    def knowing(drafter, cache, anchor, bonus, calibrate):
        """Return a drafter that knows the answer but drafts every fourth token wrong."""
        following = range(anchor - 9 + 1, anchor - 9 + drafter.size)
        return [(answer + [0] * 6)[i] if i % 4 else 1 for i in following], torch.ones(drafter.size - 1)

    def both(ids, mask, stop):
        arguments = {"attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": stop}
        own = twin.generate(ids, do_sample=False, **arguments)
        arguments |= {"return_dict_in_generate": True, "drafter": str(tmp_path / "drafter")}
        return own, shipped.generate(twin, inputs=ids, **arguments)

    prompts = torch.randint(3, 97, (12, 9), generator=generator)
    for number, ids in enumerate(prompts.split(1)):
        answer[:] = twin.generate(ids, do_sample=False, max_new_tokens=14)[0, 9:].tolist()
        stop = [answer[number]] if number < 10 else None
        with monkeypatch.context() as patch:
            patch.setattr(shipped.Drafter, "block", knowing)
            own, found = both(ids, torch.ones_like(ids), stop)
        assert torch.equal(found.sequences, own)
        length, gained = own.shape[1] - 9, found.acceptance_lengths[0]
        assert length - sum(gained) in (0, 1) and set(gained[:-1]) <= {4}  # 1: a final bonus token, not verified
        ends.add("first" if length == 1 else "bonus" if length > sum(gained) else "drafted" if stop else "limit")
    assert ends == {"first", "bonus", "drafted", "limit"}
    mask = torch.ones_like(prompts)
    mask[1::3, :4] = mask[2::3, :8] = 0
    answers = twin.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=14)[:, 9:]
    own, found = both(prompts, mask, sorted({int(answers[0, 0]), int(answers[1, 4]), int(answers[2, 9])}))
    assert torch.equal(found.sequences, own) and (own == 0).any()


def test_a_target_in_bfloat16(tmp_path):
    target, draft = random_pair("gemma 3", dtype="bfloat16")
    twin, ids = (
        plain(target, tmp_path),
        torch.full((1, 20), 5),
    )  # rounding may resolve ties differently: check only that it runs
    found = here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=24, eos_token_id=96)
    assert twin.dtype == torch.bfloat16 and 21 <= found.shape[1] <= 44


def test_a_streamer_receives_the_prompt_and_each_token_in_order(tmp_path):
    class Recorder:
        tokens, ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    target, draft = random_pair("qwen3")
    twin, streamer = plain(target, tmp_path), Recorder()
    found = here(twin, draft, tmp_path / "drafter", torch.tensor([[3, 4, 5]]), max_new_tokens=9, streamer=streamer)
    assert streamer.tokens == found[0].tolist() and streamer.ended


def test_a_complete_and_sharded_artifact_drafts_the_same(tmp_path, monkeypatch):
    target, draft = random_pair("qwen3")
    export_draft(draft, tmp_path / "own", torch.float32)
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 20_000)
    export_draft(draft, tmp_path / "whole", torch.float32, complete=True)
    own, whole = (shipped._tensors(tmp_path / name) for name in ("own", "whole"))
    assert own.keys() == whole.keys() and all(torch.equal(tensor, whole[name]) for name, tensor in own.items())


def test_unsupported_requests_are_rejected(tmp_path, artifact):
    target, draft = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    export_draft(draft, tmp_path / "drafter", torch.float32)
    filled = DynamicCache()
    forward_cached(twin, ids[:, :1], filled)
    dictionary = {"return_dict_in_generate": True}
    refused = {
        "does not support num_beams": {"num_beams": 2},
        "does not support guidance_scale, output_scores": {"guidance_scale": 2.0, "output_scores": True, **dictionary},
        "does not support negative_prompt_ids, position_ids": {"position_ids": ids, "negative_prompt_ids": ids},
        "stop strings, you must pass the model's tokenizer": {"stop_strings": ["x"]},
        "expected one of off, cumulative_product, min_confidence": {"selection": "best"},
        "A prompt is empty": {"attention_mask": torch.zeros_like(ids)},
        "only an empty cache": {"past_key_values": filled},
        "pass the full prompt": {"cache": filled},
        "no_such_argument": {"no_such_argument": 1},
        "num_target_layers=8, but this one has 5": {"drafter": str(artifact[1])},
        "not a drafter; expected a config.json": {"drafter": str(tmp_path / "target")},
        "drafter=None: no drafter was given": {"drafter": None},
    }
    for message, arguments in refused.items():
        call = {"input_ids": ids, "drafter": str(tmp_path / "drafter"), "max_new_tokens": 4} | arguments
        with pytest.raises(ValueError, match=message):
            shipped.generate(twin, **call)


def test_a_target_on_two_devices_is_rejected(tmp_path):
    target, draft = random_pair("qwen3")
    twin = plain(target, tmp_path)
    twin.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="split across devices"):
        here(twin, draft, tmp_path / "drafter", torch.tensor([[3, 4, 5]]), max_new_tokens=4)


def test_the_target_is_left_unchanged(tmp_path):
    target, _ = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    here(twin, random_draft(target), tmp_path / "drafter", ids, max_new_tokens=8)
    assert twin.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    assert all(layer.self_attn.is_causal for layer in twin.model.layers)
    assert twin.config._attn_implementation == "sdpa"


def test_blocks_stay_below_the_length_at_which_longrope_changes(tmp_path):
    target, draft = random_pair("phi 4 mini")  # changes after 128 positions
    twin, ids = plain(target, tmp_path), torch.full((1, 100), 5)
    here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=16)
    with pytest.raises(ValueError, match="100 prompt tokens, 17 new ones .* exceed 128 positions"):
        here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=17)


def test_settings_come_from_the_call_then_its_config_then_the_models_config(tmp_path):
    target, draft = random_pair("qwen3")
    twin, ids = plain(target, tmp_path), torch.tensor([[3, 4, 5]])
    twin.generation_config.eos_token_id = None
    config = GenerationConfig(max_new_tokens=9)
    assert here(twin, draft, tmp_path / "drafter", ids, generation_config=config).shape[1] == 12
    assert here(twin, draft, tmp_path / "drafter", ids, generation_config=config, max_new_tokens=4).shape[1] == 7
    first = int(here(twin, draft, tmp_path / "drafter", ids, max_new_tokens=1)[0, 3])
    twin.generation_config.eos_token_id = [first]
    assert here(twin, draft, tmp_path / "drafter", ids, generation_config=config).shape[1] == 4


@pytest.mark.slow
def test_defaults_are_those_of_generate(tmp_path):
    """20 new tokens, top-k of 50 when sampling, repetition penalties."""
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


def test_a_changed_drafter_is_reloaded(tmp_path):
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
