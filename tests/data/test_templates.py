"""Arguments of the chat template: what it does not read has no effect, and does not pass for an effect."""

import pytest
from helpers.chat import HERE, encoder_for
from helpers.shared import command

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.templates import check_template_kwargs, variables_read

QWEN = (HERE / "templates" / "qwen3.jinja").read_text(encoding="utf-8")


def check(template, given, *overrides):
    said = []
    check_template_kwargs(template, given, list(overrides), said.append)
    return said


@pytest.mark.parametrize("name", [None, "tiny without markers", "qwen3", "llama3", "mistral"])
def test_what_changes_a_conversation_is_read_and_nothing_else(name):
    """Against the rendering itself: a variable that is not read changes no conversation, whatever its value."""
    encoder, tokenizer = encoder_for(name, {})
    read = variables_read(encoder.template)
    assert "messages" in read and not read & {"raise_exception", "strftime_now", "namespace", "range"}
    messages = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    for variable in ("enable_thinking", "enable_thinkin", "date_string", "thinking", "bos_token"):
        texts = set()
        for value in (True, False, "some text"):
            own = ChatEncoder(tokenizer, {variable: value})
            texts |= {own._text(messages), own._text(messages[:2], generation_prompt=True) + "prompt"}
        assert len(texts) == 2 or variable in read


def test_a_misspelled_argument_is_refused_with_the_right_one():
    assert check(QWEN, {"enable_thinking": False}) == []
    for wrong in ("enable_thinkng", "thinking", "enable-thinking"):
        with pytest.raises(UserError, match=f"data.template_kwargs.{wrong} has no effect.*mean enable_thinking"):
            check(QWEN, {wrong: False})


def test_an_argument_for_another_target_is_a_warning_unless_the_command_gives_it():
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (said,) = check(plain, {"enable_thinking": False}, "+experiment=qwen3_8b")
    assert said.startswith("warning: data.template_kwargs.enable_thinking has no effect")
    typed = ["+data.template_kwargs.enable_thinking=false", "++data.template_kwargs={enable_thinking: false}"]
    for override in typed:
        with pytest.raises(UserError, match="enable_thinking has no effect.*Remove it"):
            check(plain, {"enable_thinking": False}, override)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "chat_template", "return_assistant_tokens_mask"])
def test_what_is_set_for_every_conversation_is_not_for_the_user(name):
    with pytest.raises(UserError, match=f"data.template_kwargs.{name} is reserved: the pipeline sets it"):
        check(QWEN, {name: True})


def test_arguments_of_the_rendering_that_the_template_reads_are_taken():
    assert check("{{ tools }}{{ messages }}", {"tools": []}) == []
    with pytest.raises(UserError, match="tools has no effect"):
        check("{{ messages }}", {"tools": []}, "+data.template_kwargs.tools=[]")


@pytest.mark.parametrize("template", ["{% if x %}", "{{ messages"])
def test_a_template_that_does_not_parse_is_left_to_the_rendering(template):
    assert variables_read(template) is None and check(template, {"x": 1}) == []


def test_a_variable_that_a_template_sets_itself_where_it_is_missing_is_read():
    assert "day" in variables_read("{% if day is not defined %}{% set day = 1 %}{% endif %}{{ day }}")
    assert "day" in variables_read("{%- set day = day | default(1) %}{{ day }}")
    assert "day" not in variables_read("{% set day = 1 %}{{ day }}{% for m in messages %}{% break %}{% endfor %}")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "data.report"])
def test_the_commands_refuse_an_argument_without_effect(module, tmp_path):
    done = command("+experiment=tiny", "+data.template_kwargs.enable_thinkng=false", cwd=tmp_path, module=module)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: data.template_kwargs.enable_thinkng has no effect" in done.stderr
    assert not list(tmp_path.glob("checkpoints/*/attention_tuning"))
