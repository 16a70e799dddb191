"""Regeneration: each sample exactly once despite kills; answers equal the target's; filters count what they drop."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.regeneration import read, run, server, users, write
from helpers.shared import TINY
from helpers.stub_server import StubServer, rule
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import Asked, Sample, Sampling, repeats
from data.regenerate.local_backend import LocalBackend
from data.regenerate.sample_log import SampleLog

QUESTIONS = [
    {"id": "one", "question": "Tom has 3 apples and buys 4 more. How many?", "answer": "7"},
    {"turns": ["What is 2+3?", "And 3+4?", "And 4+5?"]},
    {"id": 3, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"},
        ]
    },
]
IDS = ["one", "questions.jsonl:2", "3", "questions.jsonl:4"]


def start(folder, *overrides):
    call = [sys.executable, "-m", "data.regenerate", "+experiment=tiny", "data.path=questions.jsonl", *overrides]
    return subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def expected(record_questions):
    messages = []
    for question in record_questions:
        messages.append(question)
        if question["role"] == "user":
            messages.append({"role": "assistant", "content": rule(messages)})
    return messages


def test_every_turn_is_answered_in_order(tmp_path):
    write(tmp_path, QUESTIONS)
    with StubServer() as stub:
        printed = run(tmp_path, *server(stub), "+regenerate.server.extra.top_k=5", "+data.template_kwargs.x=1")
    assert "4 conversations: 4 kept" in printed
    found = read(tmp_path)
    assert [sample["id"] for sample in found] == IDS
    user = [
        [{"role": "user", "content": c} for c in turns] for turns in (["What is 2+3?", "And 3+4?", "And 4+5?"], "ac")
    ]
    assert found[1]["messages"] == expected(user[0]) and found[3]["messages"] == expected(user[1])
    assert found[2]["messages"] == expected(QUESTIONS[2]["messages"])
    body = stub.bodies[0]
    assert body["temperature"] == 0 and body["top_k"] == 5 and body["chat_template_kwargs"] == {"x": 1}
    assert body["max_tokens"] == 256 and body["model"].endswith("src/data/tiny/target") and "seed" in body
    record = json.loads((tmp_path / "checkpoints/tiny/regenerated.settings.json").read_text())
    assert record["outcomes"] == {"kept": 4} and record["settings"]["temperature"] == 0
    assert record["settings"]["template_kwargs"] == {"x": 1} and record["settings"]["backend"] == "server"


@pytest.mark.slow
def test_server_faults_neither_lose_nor_repeat_samples(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(40)])
    with StubServer(faults=[500, "hang up", 429, "half", 503] * 3, delay=0.02) as stub:
        run(tmp_path, *server(stub), "regenerate.server.in_flight=8")
    assert [s["messages"][1]["content"] for s in read(tmp_path)] == [f"answer 1 to q{i}" for i in range(40)]
    assert sum(stub.asked.values()) == 40 + 15 and 2 <= stub.most_at_once <= 8


@pytest.mark.slow
def test_a_client_killed_at_any_time_finishes_every_sample_once(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(120)])
    log = tmp_path / "checkpoints" / "tiny" / "regenerated.unfinished.jsonl"
    with StubServer(delay=0.05) as stub:
        call = (*server(stub), "regenerate.server.in_flight=4")
        for kill_after in (15, 50, 90):
            process = start(tmp_path, *call)
            while not log.exists() or len(log.read_bytes().splitlines()) < kill_after:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        with log.open("ab") as file:
            file.write(b'{"id": "questions.jsonl:9')  # incomplete line, as after a power failure
        printed = run(tmp_path, *call)
    assert "120 conversations: 120 kept" in printed
    assert [s["id"] for s in read(tmp_path)] == [f"questions.jsonl:{i}" for i in range(1, 121)]
    repeated = sum(stub.asked.values()) - 120
    assert repeated <= 3 * 4  # only requests in flight at a kill are repeated
    assert not log.exists() and "already finished" in run(tmp_path, *call)


@pytest.mark.slow
def test_an_unavailable_server_stops_the_run_without_losing_answers(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(30)])
    with StubServer(faults=[None] * 10 + [503] * 10_000) as stub:
        # One request at a time: ten answers before the faults.
        call = ("regenerate.backend=server", f"regenerate.server.url={stub.url}", "regenerate.server.in_flight=1")
        printed = run(tmp_path, *call, "regenerate.server.patience=2", status=1)
        assert (
            "No answer from" in printed
            and "for 2 seconds (HTTP 503" in printed
            and "run the same command to resume" in printed
        )
        stub.faults.clear()
        run(tmp_path, *call, "regenerate.server.patience=2")
    assert len(read(tmp_path)) == 30 and sum(n for q, n in stub.asked.items() if q in ("q0", "q5", "q9")) == 3


def test_an_unreachable_server_is_reported_with_its_url(tmp_path):
    write(tmp_path, QUESTIONS)
    call = ("regenerate.backend=server", "regenerate.server.url=http://127.0.0.1:9/v1", "regenerate.server.patience=1")
    assert "No answer from http://127.0.0.1:9/v1 for 1 seconds (ConnectError" in run(tmp_path, *call, status=1)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "count"), [(404, 5), (401, 5), (422, 30), (400, 5)])
def test_a_server_that_rejects_every_request_is_an_error(status, count, tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(count)])
    with StubServer(faults=[status] * 1000) as stub:
        printed = run(tmp_path, *server(stub), status=1)
        assert "is rejecting requests" in printed and f"HTTP {status}" in printed and "regenerate.server.url" in printed
        stub.faults.clear()  # fixed
        assert f"{count} conversations: {count} kept" in run(tmp_path, *server(stub))


def test_an_answer_aborted_by_the_server_is_requested_again(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(5)])
    endings = iter(["stop", "abort", None, "stop", "content_filter"] + ["stop"] * 10)
    with StubServer(finish=lambda _: next(endings)) as stub:
        printed = run(tmp_path, *server(stub), "regenerate.server.in_flight=1")
    assert "4 kept, 1 refused" in printed and sum(stub.asked.values()) == 7
    assert "content_filter" in read(tmp_path, "regenerated.dropped.jsonl")[0]["reason"]


def test_a_question_that_always_breaks_the_server_does_not_block_the_others(tiny_tokenizer, monkeypatch, capsys):
    from data.regenerate import server_backend as module

    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    how = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 0, "drop_cut_off": True}
    found = {}
    with StubServer(poison="hang up") as stub:
        backend = module.ServerBackend(
            Sampling(**how, repeat_words=9, repeat_times=3), {}, ChatEncoder(tiny_tokenizer, {}), url=stub.url,
            model="m", in_flight=2, patience=60, timeout=10, key_file=None, extra={},
        )  # fmt: skip
        conversations = [Sample(str(i), users(text)) for i, text in enumerate(["a", "poison", "b", "c"])]
        tokens = []
        backend.run(
            conversations, lambda e: found.update({e.id: e.outcome}), answered_before=False, on_tokens=tokens.append
        )
    assert found == {"0": "kept", "2": "kept", "3": "kept"}
    assert backend.open == 1 and "warning: 1: no answer after 6 attempts" in capsys.readouterr().out


def test_ids_distinguish_files_with_the_same_name(tmp_path):
    for year in ("2024", "2025"):
        (tmp_path / "logs" / year).mkdir(parents=True)
        write(tmp_path / "logs" / year, [{"question": f"{year}-{i}", "answer": "a"} for i in range(3)])
    with StubServer() as stub:
        run(tmp_path, *server(stub), "data.path=logs")
        assert [s["id"] for s in read(tmp_path)] == [
            f"{year}/questions.jsonl:{i}" for year in ("2024", "2025") for i in (1, 2, 3)
        ]
        both = "data.path=[logs/2024/questions.jsonl,logs/2025/questions.jsonl]"
        run(tmp_path, *server(stub), both, "name=both")
    found = [json.loads(line) for line in (tmp_path / "checkpoints/both/regenerated.jsonl").read_text().splitlines()]
    assert [s["id"] for s in found] == [f"{n}questions.jsonl:{i}" for n in ("", "2/") for i in (1, 2, 3)]
    assert [s["messages"][0]["content"][:4] for s in found] == ["2024"] * 3 + ["2025"] * 3


@pytest.mark.slow
def test_overwriting_starts_over_once(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(12)])
    with StubServer() as stub:
        run(tmp_path, *server(stub))
        stub.faults = [None] * 5 + [404] * 100
        call = (*server(stub), "regenerate.temperature=0.5", "overwrite=true", "regenerate.server.in_flight=1")
        run(tmp_path, *call, status=1)
        stub.faults.clear()
        run(tmp_path, *call)  # resumes
        assert sum(stub.asked.values()) == 12 + 6 + 7
        run(tmp_path, *call)  # finished: starts over
    assert sum(stub.asked.values()) == 12 + 13 + 12 and len(read(tmp_path)) == 12


def test_lone_surrogates_are_rejected(tmp_path):
    write(tmp_path, [{"id": "\ud800", "question": "q", "answer": "a"}, {"\ud800": 1}, {"question": "q", "answer": "a"}])
    with StubServer(says=lambda _: "\ud83d") as stub:
        printed = run(tmp_path, *server(stub), "data.bad_records=skip", status=1)
    assert "1 conversations: 1 refused" in printed and "No answers were kept" in printed
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "checkpoints/tiny/regenerate_rejects.jsonl").open()]
    assert reasons[0].startswith("the id contains a lone surrogate") and "found keys: \\ud800" in reasons[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("regenerate.server.url=localhost:8000", "starting with http://"),
        ("regenerate.server.key_file=nowhere.txt", "no such file"),
        ("regenerate.server.in_flight=many", "in_flight"),
        ("regenerate.repeat_times=1", "expected 0 (disabled) or at least 2"),
        ("regenerate.backend=vllm", "expected local or server"),
        ("data.max_records=all", "expected an integer"),
        ("data.num_proc=2.5", "expected an integer"),
        ("name=[5]", "expected str"),
        ("model.target.dtype=float99", "float32 or bfloat16"),
    ],
)
def test_invalid_settings_are_rejected(setting, message, tmp_path):
    write(tmp_path, QUESTIONS)
    printed = run(tmp_path, "regenerate.backend=server", setting, status=1)
    assert message in printed and not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_max_new_tokens_without_room_for_a_prompt_is_rejected(tmp_path):
    write(tmp_path, QUESTIONS)
    printed = run(tmp_path, "regenerate.max_new_tokens=1024", status=1)
    assert "regenerate.max_new_tokens=1024 leaves no room" in printed and "context length is 1024" in printed
    run(tmp_path)  # the rejected settings were not recorded


def test_a_rejected_request_is_a_dropped_sample(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "a"} for i in range(5)])
    with StubServer(faults=[None, None, 400]) as stub:  # the first two find out that the server returns no token ids
        printed = run(tmp_path, *server(stub), "regenerate.server.in_flight=1")
    assert "4 kept, 1 refused" in printed
    (dropped,) = read(tmp_path, "regenerated.dropped.jsonl")
    assert dropped["reason"].startswith("refused: HTTP 400") and dropped["id"] == "questions.jsonl:3"


def test_answers_are_filtered_and_counted(tmp_path):
    write(tmp_path, [{"question": q, "answer": "a"} for q in ("fine", "loop", "empty", "blank")])
    says = {"fine": "a b c d e f", "loop": "a b c a b c a b c", "empty": "", "blank": " \n"}
    with StubServer(says=lambda messages: says[messages[-1]["content"]]) as stub:
        printed = run(tmp_path, *server(stub), "regenerate.repeat_words=3", "regenerate.repeat_times=3")
    assert "1 kept" in printed and "1 repeats itself" in printed and "2 empty" in printed
    assert [s["messages"][0]["content"] for s in read(tmp_path)] == ["fine"]
    assert [s["reason"] for s in read(tmp_path, "regenerated.dropped.jsonl")] == ["repeats itself", "empty", "empty"]


@pytest.mark.parametrize("keep", [False, True])
def test_cut_off_answers_are_dropped_or_kept(keep, tmp_path):
    write(tmp_path, QUESTIONS)
    with StubServer(finish="length") as stub:
        run(tmp_path, *server(stub), f"regenerate.drop_cut_off={not keep}", status=int(not keep))
    assert len(read(tmp_path)) == (4 if keep else 0)
    assert stub.asked["What is 2+3?"] == 1 and not stub.asked["And 3+4?"]  # there is no history to continue


@pytest.mark.slow
def test_different_settings_are_rejected(tmp_path):
    write(tmp_path, QUESTIONS)
    with StubServer() as stub:
        run(tmp_path, *server(stub))
        printed = run(tmp_path, *server(stub), "regenerate.temperature=0.5", status=1)
        assert "temperature: 0.0 -> 0.5" in printed and "overwrite=true" in printed
        run(tmp_path, *server(stub), "regenerate.server.in_flight=2")  # does not affect the answers
        run(tmp_path, *server(stub), "regenerate.temperature=0.5", "overwrite=true")
    assert stub.bodies[-1]["temperature"] == 0.5


def test_the_api_key_is_sent_but_never_written(tmp_path):
    write(tmp_path, QUESTIONS)
    (tmp_path / "key.txt").write_text("secret-123\n")
    with StubServer() as stub:
        printed = run(tmp_path, *server(stub), "regenerate.server.key_file=key.txt")
    assert stub.bodies[0]["key"] == "Bearer secret-123" and "secret-123" not in printed
    for file in (tmp_path / "checkpoints").rglob("*"):
        assert file.is_dir() or b"secret-123" not in file.read_bytes()


def test_bad_questions_and_duplicate_ids_are_rejected(tmp_path):
    write(tmp_path, [*QUESTIONS, {"id": "one", "question": "again", "answer": "a"}, {"turns": []}])
    with StubServer() as stub:
        printed = run(tmp_path, *server(stub), status=1)
        assert (
            "2 of 6 records" in printed
            and "duplicate id 'one', first used at questions.jsonl:1" in printed
            and not stub.bodies
        )
        run(tmp_path, *server(stub), "data.bad_records=skip")
    assert [s["id"] for s in read(tmp_path)] == IDS
    assert len((tmp_path / "checkpoints/tiny/regenerate_rejects.jsonl").read_text().splitlines()) == 2


def test_a_file_without_a_settings_record_is_not_overwritten(tmp_path):
    write(tmp_path, QUESTIONS)
    (tmp_path / "mine.jsonl").write_text("precious")
    assert "without a record of its settings" in run(tmp_path, "regenerate.output=mine.jsonl", status=1)
    assert (tmp_path / "mine.jsonl").read_text() == "precious"


def local(tokenizer, name=TINY / "target", **changes):
    target = {"name": str(name), "revision": None, "dtype": "float32"}
    how = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 24, "seed": 0, "drop_cut_off": False}
    sampling = Sampling(**how | {"repeat_words": 12, "repeat_times": 0} | changes)
    return LocalBackend(target, tokenizer, ChatEncoder(tokenizer, {}), sampling, batch_size=3, device="cpu")


def answers(backend, questions):
    found = {}
    backend.run(
        [Sample(str(i), list(q)) for i, q in enumerate(questions)],
        lambda c: found.update({c.id: c}),
        answered_before=False,
        on_tokens=lambda count: None,
    )
    return [found[str(i)] for i in range(len(questions))]


@pytest.mark.slow
def test_batched_answers_equal_single_ones(tiny_tokenizer, tiny_target):
    import torch

    questions = [users("Tom has 3 apples. How many?"), users("Count: 1, 2.", "And fish?")]
    questions += [users("What is 2+2?"), users("A train drives 60 miles an hour for 3 hours. How far?")]
    for conversation in answers(local(tiny_tokenizer, max_new_tokens=88), questions):
        for turn, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            prompt = tiny_tokenizer.apply_chat_template(
                conversation.messages[:turn], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            with torch.no_grad():
                output = tiny_target.generate(prompt, do_sample=False, max_new_tokens=88)
            alone = output[0, prompt.shape[1] :]
            assert conversation.written[turn].token_ids == alone.tolist()
            assert message["content"] == tiny_tokenizer.decode(alone, skip_special_tokens=True).rstrip()
        assert conversation.outcome == "kept"


def test_local_answers_follow_the_targets_generation_config(tiny_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(TINY / "target", tmp_path / "target")
    settings = {"eos_token_id": 2, "pad_token_id": 0, "repetition_penalty": 1.4, "suppress_tokens": [270]}
    settings |= {"do_sample": True, "temperature": 0.3, "top_k": 1, "min_p": 0.5, "num_beams": 3}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(settings))
    question = [users("Tom has 3 apples. How many?")]
    found = answers(local(tiny_tokenizer, tmp_path / "target"), question)[0].messages[-1]["content"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="float32")
    prompt = tiny_tokenizer.apply_chat_template(
        question[0], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for penalty in (1.4, 1.0):
        how = {"do_sample": False, "num_beams": 1, "max_new_tokens": 24, "repetition_penalty": penalty}
        output = model.generate(prompt, attention_mask=prompt.new_ones(prompt.shape), **how)
        own = tiny_tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        assert (own == found) == (penalty == 1.4)


def test_sampling_is_seeded_and_long_prompts_are_rejected(tiny_tokenizer):
    questions = [users("Tom has 3 apples. How many?"), users("word " * 1100)]
    first, again = (answers(local(tiny_tokenizer, temperature=1.0), questions) for _ in range(2))
    other = answers(local(tiny_tokenizer, temperature=1.0, seed=1), questions)
    assert first[0].messages == again[0].messages != other[0].messages
    assert first[1].outcome.startswith("refused: ") and "no room" in first[1].outcome


def test_the_local_backend_runs_from_the_command_line(tmp_path):
    write(tmp_path, QUESTIONS[:2])
    run(tmp_path, "regenerate.max_new_tokens=16", "regenerate.drop_cut_off=false")
    found = read(tmp_path)
    assert [s["id"] for s in found] == IDS[:2] and [len(s["messages"]) for s in found] == [2, 2]
    assert all(s["messages"][1]["truncated"] and len(s["messages"][1]["token_ids"]) == 16 for s in found)
    record = json.loads((tmp_path / "checkpoints/tiny/regenerated.settings.json").read_text())
    assert len(record["settings"]["files"]["model.safetensors"]) == 64  # the hash of the target's weights


@given(words=st.lists(st.sampled_from("abc"), max_size=14), run_length=st.integers(1, 4), times=st.integers(2, 4))
@settings(max_examples=300, deadline=None)
def test_repeats_equals_counting_ngrams(words, run_length, times):
    runs = [words[i : i + run_length] for i in range(len(words) - run_length + 1)]
    assert repeats(" ".join(words), run_length, times) == any(runs.count(run) >= times for run in runs)


ANSWERED = {"messages": [{"role": "assistant"}]}


def test_the_log_drops_an_incomplete_line(tmp_path):
    log = SampleLog(tmp_path / "log")
    log.add("a", {"x": 1, **ANSWERED})
    log.add("b", {"x": "é", **ANSWERED})
    with pytest.raises(ValueError, match="already in the log"):
        log.add("a", {"x": 2})
    content = (tmp_path / "log").read_bytes()
    for cut in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:cut])
        found = SampleLog(tmp_path / "cut")
        assert len(found) == content[:cut].count(b"\n")
        for sample_id in {"a", "b"} - {key.id for key in found.offsets}:
            found.add(sample_id, {"x": 3, **ANSWERED})
        assert [entry["id"] for entry in found.read([Asked("b", None), Asked("a", None)])] == ["b", "a"]


def test_a_full_disk_leaves_no_incomplete_line(tmp_path, monkeypatch):
    log = SampleLog(tmp_path / "log")
    log.add("a", {"x": 1, **ANSWERED})
    real = log._file

    class Full:
        def write(self, line):
            return real.write(line[:5])

    monkeypatch.setattr(log, "_file", Full())
    with pytest.raises(UserError, match="disk full"):
        log.add("b", {"x": 2})
    assert [key.id for key in SampleLog(tmp_path / "log").offsets] == ["a"]
