"""Arguments of the chat template: one that the template does not read is reported."""

import pytest
from helpers.chat import HERE, encoder_for
from helpers.forked import forked_command
from helpers.records import config

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.templates import check_template_kwargs, variables_read
from data.regenerate.run import check_regeneration

QWEN = (HERE / "templates" / "qwen3.jinja").read_text(encoding="utf-8")


def check(template, given, *overrides):
    warnings = []
    check_template_kwargs(template, given, list(overrides), warnings.append)
    return warnings


@pytest.mark.parametrize("name", [None, "tiny without markers", "qwen3", "llama3", "mistral"])
def test_only_variables_that_change_a_conversation_count_as_read(name):
    """Compare with the rendering: a variable that is not read never changes it."""
    encoder, tokenizer = encoder_for(name, {})
    read = variables_read(encoder.template)
    assert "messages" in read and not read & {"raise_exception", "strftime_now", "namespace", "range"}
    messages = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    for variable in ("enable_thinking", "enable_thinkin", "date_string", "thinking", "bos_token"):
        texts = set()
        for value in (True, False, "some text"):
            own = ChatEncoder(tokenizer, {variable: value})
            texts |= {own._render(messages, False), own._render(messages[:2], True) + "prompt"}
        assert len(texts) == 2 or variable in read


def test_a_misspelled_argument_is_rejected_with_a_suggestion():
    assert check(QWEN, {"enable_thinking": False}) == []
    for typo in ("enable_thinkng", "thinking", "enable-thinking"):
        with pytest.raises(UserError, match=f"data.template_kwargs.{typo} has no effect.*mean enable_thinking"):
            check(QWEN, {typo: False})


def test_an_unread_argument_is_a_warning_unless_set_on_the_command_line():
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (warning,) = check(plain, {"enable_thinking": False}, "+experiment=qwen3_8b")
    assert warning.startswith("warning: data.template_kwargs.enable_thinking has no effect")
    typed = ["+data.template_kwargs.enable_thinking=false", "++data.template_kwargs={enable_thinking: false}"]
    for override in typed:
        with pytest.raises(UserError, match="enable_thinking has no effect.*Remove it"):
            check(plain, {"enable_thinking": False}, override)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "chat_template", "return_assistant_tokens_mask"])
def test_reserved_arguments_are_rejected(name):
    with pytest.raises(UserError, match=f"data.template_kwargs.{name} is reserved: the pipeline sets it"):
        check(QWEN, {name: True})


def test_rendering_arguments_that_the_template_reads_are_accepted():
    assert check("{{ tools }}{{ messages }}", {"tools": []}) == []
    with pytest.raises(UserError, match="tools has no effect"):
        check("{{ messages }}", {"tools": []}, "+data.template_kwargs.tools=[]")


@pytest.mark.parametrize("template", ["{% if x %}", "{{ messages"])
def test_an_invalid_template_is_reported_by_the_rendering(template):
    assert variables_read(template) is None and check(template, {"x": 1}) == []


def test_a_variable_with_a_default_in_the_template_counts_as_read():
    assert "day" in variables_read("{% if day is not defined %}{% set day = 1 %}{% endif %}{{ day }}")
    assert "day" in variables_read("{%- set day = day | default(1) %}{{ day }}")
    assert "day" not in variables_read("{% set day = 1 %}{{ day }}{% for m in messages %}{% break %}{% endfor %}")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "data.report"])
def test_the_commands_reject_an_argument_without_effect(module, tmp_path):
    done = forked_command("+experiment=tiny", "+data.template_kwargs.enable_thinkng=false", cwd=tmp_path, module=module)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: data.template_kwargs.enable_thinkng has no effect" in done.stderr
    assert not list(tmp_path.glob("checkpoints/*/attention_tuning"))


def test_regeneration_by_a_server_refuses_reserved_arguments():
    changed = config(data__template_kwargs={"add_generation_prompt": True}, regenerate__backend="server")
    with pytest.raises(UserError, match=r"data\.template_kwargs\.add_generation_prompt is reserved"):
        check_regeneration(changed)
