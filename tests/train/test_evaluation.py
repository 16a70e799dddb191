"""Evaluation: the report matches the decoding, and changed outputs are detected."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluation import HOW
from helpers.flops import flop_counter
from helpers.shared import SHORT, TINY, command, random_draft, random_target

from data.config.compose import composed
from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.sources.benchmarks import ALL
from data.sources.readers import read_strictly
from data.sources.records import Conversation, questions
from models.artifact import EARLIER_RECOMMENDATION, FLEXDRAFT_KEYS, RECOMMENDATION
from models.cost.flops import DecodingFlops
from models.decoding.flex import generate
from models.decoding.forward_passes import ForwardPasses, prefill
from models.decoding.generation_settings import sequence_state
from models.decoding.reference import autoregressive_generate
from models.decoding.sampling import Sampling
from models.decoding.selection import OFF, Selection
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import load_draft
from models.export.recommendation import recommended
from models.target import load_target
from train import stages
from train.context import Resources
from train.evaluate.acceptance import (
    BenchmarkReport,
    Prompts,
    Variant,
    VariantReport,
    _kind,
    check_baseline,
    compare,
    first_differences,
    histogram,
    own_answers,
    pooled,
)
from train.evaluate.groups import labels
from train.evaluate.report import BY_KIND, Evaluation, _remarks, markdown, print_report
from train.evaluate.run import evaluate_drafter
from train.evaluate.throughput import ALONE, Speed, filled, recommendation
from train.run_dir.state import file_sha256, read_json, write_json


def short(*overrides: str):
    return composed([*SHORT, "name=short", *overrides])


@pytest.mark.slow
def test_the_report_contains_speed_and_recommended_mode(trained_run):
    report = (trained_run / "evaluate" / "report.md").read_text(encoding="utf-8")
    for words in ("95%", "Tokens/s by batch size", "Time per verify step in ms", "| off |", "recommended on CPU"):
        assert words in report
    speed = read_json(trained_run / "evaluate" / "report.json")["speed"]
    assert [(s["decoder"], s["rows"]) for s in speed["by_rows"]] == [
        (decoder, rows) for rows in (1, 2) for decoder in (ALONE, "sequential", "parallel")
    ]
    for s in speed["by_rows"]:
        assert s["spread"][0] <= s["tokens_per_second"] <= s["spread"][1]
        if s["decoder"] == ALONE:
            assert s["tau"] == 1 and s["candidates"] == 1
    by_mode = {s["decoder"]: s for s in speed["by_rows"] if s["rows"] == 1}
    assert by_mode["sequential"]["tau"] == by_mode["parallel"]["tau"] > 1
    assert by_mode["parallel"]["step_flops"] > by_mode["sequential"]["step_flops"] > by_mode[ALONE]["step_flops"]
    for file in ("speed.png", "../acceptance_by_slot.png"):
        assert (trained_run / "evaluate" / file).stat().st_size > 0


@pytest.mark.slow
def test_the_recommendation_is_in_the_artifact_and_leaves_it_loadable(trained_run, tiny_target):
    speed = read_json(trained_run / "evaluate" / "report.json")["speed"]
    assert read_json(trained_run / "export" / RECOMMENDATION) == speed["recommended"]
    draft = load_draft(trained_run / "export", tiny_target)
    generate(tiny_target, draft, [[5, 6, 7]], max_new_tokens=4, **recommended(trained_run / "export"))


@pytest.mark.slow
def test_a_run_changes_no_exported_file_after_the_export(trained_run):
    """The export's record has the hashes at export time; later stages only add files."""
    files = {str(f.relative_to(trained_run)): f for f in (trained_run / "export").rglob("*") if f.is_file()}
    exported = read_json(trained_run / "records" / "export.done.json")["files"]
    assert {name: file_sha256(files.pop(name)) for name in exported} == exported
    assert files.keys() == {f"export/{name}" for name in (RECOMMENDATION, "README.md", "acceptance_by_slot.png")}


@pytest.mark.slow
def test_a_run_of_an_earlier_version_with_the_recommendation_in_its_config_resumes(trained_run, tmp_path):
    """Imitate an earlier version: the record has no hash of config.json, and there is no recommendation file."""
    run_dir = Path(shutil.copytree(trained_run, tmp_path / "checkpoints" / "short"))
    (run_dir / "export" / RECOMMENDATION).unlink()
    settings = read_json(run_dir / "evaluate" / "report.json")["speed"]["recommended"] | {"parallel_rows": 3}
    config = read_json(run_dir / "export" / "config.json")
    for key in FLEXDRAFT_KEYS:
        config[key][EARLIER_RECOMMENDATION] = settings
    write_json(run_dir / "export" / "config.json", config)
    for stage, gone in (("export", "config.json"), ("evaluate", RECOMMENDATION)):
        record = read_json(run_dir / "records" / f"{stage}.done.json")
        del record["files"][f"export/{gone}"]
        write_json(run_dir / "records" / f"{stage}.done.json", record)
    before = (run_dir / "export" / "config.json").read_bytes()
    again = command(*SHORT, "name=short", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("already finished") == 4, again.stderr
    card = (run_dir / "export" / "README.md").read_text(encoding="utf-8")
    assert "| calibrated |" in card and "parallel drafting up to batch size 3" in card
    assert (run_dir / "export" / "config.json").read_bytes() == before


@pytest.mark.slow
def test_later_turns_are_conditioned_on_the_targets_own_answers(tiny_target, trained_run, tmp_path):
    encoder = Resources(short()).encoder
    talks = [
        [{"role": "user", "content": text} for text in ("Tom has 3 apples. How many?", "And with 2 more?")],
        [{"role": "user", "content": "Ann has 4 pens. How many?"}],
    ]
    conversations = [Conversation(talk) for talk in talks]
    prompts = own_answers(tiny_target, encoder, "talks", conversations, HOW)
    first, other, second = prompts.tokens
    assert other == encoder.prompt(Conversation(talks[1]))
    said = encoder.backend.decode(prompts.answers[0], skip_special_tokens=True)
    assert second == encoder.prompt(Conversation([talks[0][0], {"role": "assistant", "content": said}, talks[0][1]]))
    for prompt, answer in zip(prompts.tokens, prompts.answers, strict=True):
        assert answer == autoregressive_generate(tiny_target, prompt, HOW.max_new_tokens)
    sampled = replace(HOW, sampling=Sampling(1.0), batch_size=2)  # comparison batches the turns differently
    prompts = own_answers(tiny_target, encoder, "talks", conversations, sampled)
    untuned = DraftModel(tiny_target, DraftConfig(num_layers=6, block_size=8, calibrator_rank=0))
    assert compare(tiny_target, Variant(untuned, False), prompts, sampled, "talks").identical == 3


def accept_everything(drafted, predicted):
    return torch.full(drafted.shape[:-1], drafted.shape[-1])


@pytest.mark.slow
def test_a_changed_output_fails_the_stage(trained_run, tiny_target, tmp_path, monkeypatch):
    """Use a deliberately wrong acceptance rule."""
    run_dir = tmp_path / "short"
    shutil.copytree(trained_run, run_dir)
    config = short(f"run_dir={run_dir}", "stage.evaluate.num_prompts=2", "stage.evaluate.speed.num_prompts=0")
    config.stage.evaluate.variants = ["calibrated"]
    stages.evaluate(config, run_dir / "evaluate", Resources(config))
    monkeypatch.setattr("models.decoding.target_sampler.accepted_drafts", accept_everything)
    with pytest.raises(UserError, match=r"held_out: calibrated: prompt \d, token \d+, margin [\d.e-]+"):
        stages.evaluate(config, run_dir / "evaluate", Resources(config))
    found = read_json(run_dir / "evaluate" / "report.json")["benchmarks"]["held_out"]["variants"]["calibrated"]
    assert found["identical"] < 2 and found["differences"]


@pytest.mark.slow
def test_a_wrong_baseline_fails_the_stage(trained_run, tmp_path, monkeypatch):
    config = short(f"run_dir={trained_run}", "stage.evaluate.num_prompts=2", "stage.evaluate.speed.num_prompts=0")
    config.stage.evaluate.variants = ["calibrated"]
    right = stages.evaluate_drafter

    def both_wrong_alike(*arguments, **more):
        evaluation = right(*arguments, **more)
        evaluation.wrong.append("held_out: prompt 0: the target's answer differs from that of transformers")
        return evaluation

    monkeypatch.setattr(stages, "evaluate_drafter", both_wrong_alike)
    shutil.copytree(trained_run, tmp_path / "short")
    with pytest.raises(UserError, match="prompt 0: the target's answer differs from that of transformers"):
        stages.evaluate(config, tmp_path / "short" / "evaluate", Resources(config))


def test_first_differences_have_position_and_margin():
    target = random_target()
    target.generation_config.eos_token_id = target.config.eos_token_id = None
    prompt = [5, 6, 7]
    own = autoregressive_generate(target, prompt, 8)
    other = [*own[:3], (own[3] + 1) % 97, *own[4:]]
    found = first_differences(target, Prompts([prompt] * 3, [own] * 3), [own, other, own[:5]])
    assert [(d.prompt, d.token) for d in found] == [(1, 3), (2, 5)]
    logits = target(input_ids=torch.tensor([prompt + own[:3]])).logits[0, -1]
    best = logits.topk(2).values
    assert found[0].margin == pytest.approx(float(best[0] - best[1]), abs=1e-5)


def test_the_evaluation_applies_and_reports_the_targets_generation_settings(tiny_tokenizer):
    target = load_target(str(TINY / "target"))
    target.generation_config.repetition_penalty = 1.3
    talks = read_strictly(str(TINY / "prompts.jsonl"), questions, split="test", limit=2, setting="x")
    how = replace(HOW, max_new_tokens=12)
    variants = {"x": Variant(random_draft(target, num_layers=2), True)}
    found = evaluate_drafter(
        target, variants, {"b": talks}, ChatEncoder(tiny_tokenizer, {}), how, {"num_prompts": 0}, "t"
    )
    prompts = own_answers(target, ChatEncoder(tiny_tokenizer, {}), "b", talks, how)
    for prompt, answer in zip(prompts.tokens, prompts.answers, strict=True):
        ids = torch.tensor([prompt])
        output = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert output[0, len(prompt) :].tolist() == answer
    assert found.broken() is None and found.benchmarks["b"].variants["x"].identical == 2
    assert found.as_dict()["generation_settings"] == {"repetition_penalty": 1.3}
    assert any("generation_config, applied" in line and "repetition_penalty=1.3" in line for line in _remarks(found))
    other = [*prompts.answers[0][:9], 5]  # margins are of processed scores, not raw logits
    at = first_differences(target, prompts, [other, prompts.answers[1]])[0]
    scores = sequence_state(target, prompts.tokens[0], 12)
    for token in prompts.answers[0][:9]:
        scores.add(token)
    logits = target(input_ids=torch.tensor([prompts.tokens[0] + prompts.answers[0][:9]])).logits[0, -1]
    best, raw = scores.scores(logits).topk(2).values, logits.topk(2).values
    assert at.margin == pytest.approx(float(best[0] - best[1]), abs=1e-5) != pytest.approx(float(raw[0] - raw[1]))


@pytest.mark.slow
def test_sampled_outputs_are_the_same_with_and_without_a_drafter(tiny_target, trained_run, tiny_tokenizer):
    how = replace(HOW, sampling=Sampling(0.8, top_p=0.9))
    encoder = ChatEncoder(tiny_tokenizer, {})
    talks = read_strictly(str(TINY / "prompts.jsonl"), questions, split="test", limit=6, setting="x")
    prompts = own_answers(tiny_target, encoder, "x", talks, how)
    report = compare(tiny_target, Variant(load_draft(trained_run / "export", tiny_target), True), prompts, how, "x")
    assert report.identical == 6 and report.tau > 1
    assert prompts.kinds == ["math"] * 6
    alone = BenchmarkReport(6, 0, 10, {"x": report}, labels(prompts.kinds, prompts.tokens, prompts.answers))
    both = pooled([alone, alone])
    assert both.groups()["kind"]["math"].variants["x"].tau == pytest.approx(report.tau)
    assert both.prompts == 12 and both.variants["x"].verify_steps == 2 * report.verify_steps
    assert both.variants["x"].tau == pytest.approx(report.tau)
    assert sum(histogram(report.accepted).values()) == report.verify_steps


def measured(*accepted: list[int]) -> VariantReport:
    every = [count for steps in accepted for count in steps]
    return VariantReport(
        1 + sum(every) / len(every), 1.0, 2.0, len(every), 3.0, len(accepted), [], [0.5], list(accepted)
    )


def evaluation_of(benchmarks: dict[str, BenchmarkReport]) -> Evaluation:
    return Evaluation(HOW, "float32", "x", benchmarks, None, [])


def test_tau_by_kind_and_length_covers_every_prompt_once(tmp_path, capsys):
    kinds, lengths = ["math", "chat", "math"], [[0] * 40, [0] * 200, [0] * 128]
    variants = {"untuned": measured([0], [0, 0], [0]), "calibrated": measured([3, 1], [0], [2])}
    first = BenchmarkReport(3, 0, 9, variants, labels(kinds, lengths, lengths))
    second = BenchmarkReport(1, 0, 2, {name: measured([1]) for name in variants}, labels(["code"], [[0]], [[0]]))
    evaluation = evaluation_of({"a": first, "b": second, ALL: pooled([first, second])})
    found = evaluation.as_dict()["benchmarks"]
    by_kind = found[ALL]["by_kind"]
    assert list(by_kind) == ["chat", "code", "math"] and [of["prompts"] for of in by_kind.values()] == [1, 1, 2]
    math = by_kind["math"]["variants"]["calibrated"]
    assert math["tau"] == 3.0 and math["verify_steps"] == 3 and math["high"] >= 3.0
    assert np.isnan(by_kind["chat"]["variants"]["calibrated"]["low"])  # one prompt has no interval
    for of in (found[ALL][key] for key in ("by_kind", "by_prompt_tokens", "by_answer_tokens")):
        assert sum(group["prompts"] for group in of.values()) == 4
        assert sum(group["variants"]["calibrated"]["verify_steps"] for group in of.values()) == 5
    assert list(found["a"]["by_prompt_tokens"]) == ["33 to 128", "129 to 512"]
    assert evaluation.summary()["by_kind"]["math"] == by_kind["math"]
    text = markdown(evaluation, "x")
    assert "| all | chat | 1 | 1.00 (-) | 1.00 (-) |" in text and "| answer | 33 to 128 | 2 |" in text
    print_report(evaluation, tmp_path)
    assert BY_KIND in capsys.readouterr().out
    print_report(evaluation_of({"b": second}), tmp_path)
    assert BY_KIND not in capsys.readouterr().out  # the same numbers as in the first table


def test_reasoning_between_special_tokens_decides_the_kind(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    encoder, talk = (
        ChatEncoder(tokenizer, {}),
        [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}],
    )
    for text, kind in (("<think>Hm.</think>Yes.<|im_end|>", "reasoning"), ("<think></think>Yes.", "chat")):
        answer = encoder.backend.encode(text, add_special_tokens=False).ids
        assert _kind(encoder, Conversation(talk), encoder.prompt(Conversation(talk[:1])), answer) == kind


def test_empty_answers_are_a_group_without_tau():
    variants = {"untuned": measured([1], []), "calibrated": measured([1], [])}
    one = BenchmarkReport(2, 0, 2, variants, labels(["chat", "tools"], [[0], [0]], [[0], []]))
    text = markdown(evaluation_of({"a": one}), "x")
    assert "| a | tools | 1 | - | - |" in text and "| answer | 0 | 1 | - | - |" in text


@pytest.mark.parametrize("mode, blocks", [(ALONE, 0), ("sequential", 1), ("parallel", 5)])
def test_flops_of_a_decoding_step_match_the_flop_counter(mode, blocks):
    target = random_target()
    draft, prompt = random_draft(target), list(range(3, 43))
    _, cache = prefill(target, [prompt], capacity=200, slots=5 * draft.block_size)
    passes = ForwardPasses(target, draft, cache)
    candidates, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.arange(40, 45)[None]
    with flop_counter() as counter, torch.no_grad():
        if mode == "parallel":
            hidden = passes.verify_and_draft(candidates, positions, 45)[1][:, 0]
        else:
            passes.verify(candidates, positions, 45)
        if mode == "sequential":
            hidden = passes.draft_blocks(torch.tensor([[45]]), 45)[:, 0]
        if blocks:
            draft.logits(hidden[:, 1:], candidates[:, :1].expand(-1, 5))
    parts = DecodingFlops.of(draft).step(context=40, candidates=5, blocks=blocks)
    # Attention computes all positions, but masked ones are not counted: half of the candidates, and for the slots
    # everything except their own block and the context before the candidates.
    slots = blocks * draft.block_size
    hidden_pairs = 5 * 5 * 2.5 + 3 * slots * (5 + slots - draft.block_size)  # of 5 target and 3 draft layers
    computed = sum(parts.values()) + hidden_pairs * 4 * 4 * 8  # 4 heads of size 8
    assert computed == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert (parts["redundant blocks"] > 0) == (mode == "parallel")


def test_a_target_with_different_logits_is_detected(tiny_target, monkeypatch):
    prompts = Prompts([[5, 6, 7]], [autoregressive_generate(tiny_target, [5, 6, 7], 4)])
    how = replace(HOW, max_new_tokens=4)
    assert check_baseline(tiny_target, "x", prompts, how) == []
    scaled = lambda *a, **k: (2 * prefill(*a, **k)[0], None)  # noqa: E731  as architectures do that scale their logits
    monkeypatch.setattr("models.decoding.forward_passes.prefill", scaled)
    assert (
        "logits differ from those of transformers by 100.0% of the largest"
        in check_baseline(tiny_target, "x", prompts, how)[0]
    )


def speed(decoder: str, rows: int, rate: float, threshold: float | None = 0.01, spread: float = 0.1) -> Speed:
    return Speed(decoder, rows, threshold, 2.0, rate, (rate - spread, rate + spread), 1.0, {}, None, 3.0)


def test_the_recommendation_follows_the_measurements():
    by_rows = [
        *(speed(ALONE, rows, 10 * rows, None) for rows in (1, 2, 4)),
        *(speed("sequential", rows, rate) for rows, rate in ((1, 11), (2, 22), (4, 41))),
        *(speed("parallel", rows, rate) for rows, rate in ((1, 12), (2, 19), (4, 20))),
    ]
    tries = [speed("parallel", 1, 12, 0.01, spread=1), speed("parallel", 1, 12.5, 0.1), speed("parallel", 1, 9, None)]
    cpu = torch.device("cpu")
    found = recommendation(by_rows, tries, Selection(), cpu)
    assert found["parallel_rows"] == 1 and found["worth_it"] == [1, 2, 4] and found["device"].startswith("CPU")
    assert (found["selection"], found["threshold"]) == ("cumulative_product", 0.01)  # 12.5 is within noise
    faster = recommendation(by_rows, [*tries, speed("parallel", 1, 14, None)], Selection(), cpu)
    assert faster["selection"] == "off"
    assert recommendation(by_rows, [], OFF, cpu)["selection"] == "off"
    once = [speed("parallel", 1, 12, 0.01, spread=0), speed("parallel", 1, 13, 0.3, spread=0)]
    assert recommendation(by_rows, once, Selection(), cpu)["threshold"] == 0.01
    chance = [speed("parallel", 1, 12, 0.01), speed("parallel", 1, 12.1, 0.3)]
    assert recommendation(by_rows, chance, Selection(), cpu)["threshold"] == 0.01
    never_off = [speed("parallel", 1, 12, None), speed("parallel", 1, 12.1, 0.3)]
    assert recommendation(by_rows, never_off, Selection(threshold=0.0), cpu)["selection"] == "off"


def test_groups_are_full_and_contain_every_prompt():
    prompts = [[i] for i in range(5)]
    assert filled(prompts, 2) == [[[0], [1]], [[2], [3]], [[4], [0]]]
    assert filled(prompts[:1], 3) == [[[0], [0], [0]]]
