"""Static analysis of chat templates: which contents may change the text around messages."""

import pytest

from data.preprocess.templates import template_switches

LAST = "messages[-1].content"
# Condition -> literals that it depends on.
KNOWN = {
    f"'/no_think' in {LAST}": {"/no_think"},
    f"'/no' ~ '_think' in {LAST} | lower": {"/no_think"},
    f"{LAST} == '/fast'": {"/fast"},
    f"{LAST} in ['/fast', '/slow']": {"/fast", "/slow"},
    f"{LAST}.split('/fast') | length > 1": {"/fast"},
    "messages[-1].get('content').strip().endswith('/fast')": {"/fast"},
    f"{LAST} is string and {LAST} | trim | length > 0": set(),
    f"not {LAST}": set(),
    "messages[-1].role == 'user' and messages | length > 1": set(),
    "'tool_calls' in messages[-1]": set(),
}
UNKNOWN = (
    f"{LAST}[-9:] == '/no_think'",
    f"{LAST}[0] == '/'",
    f"{LAST} | length < 10",
    f"{LAST} < 'a'",
    f"{LAST} in messages[0].content",
    f"{LAST} == messages[0].content",
    f"switch in {LAST}",
    f"{LAST} is in ['/fast']",
    f"{LAST}.split() | length > 2",
    f"({LAST} ~ '.') == '/fast.'",
    "'/fast' in messages[-1] | tojson",
    "messages | selectattr('content', 'equalto', '/fast') | list",
    "messages | map(attribute='content') | join == '/fast'",
    "messages[-1] in [{'role': 'user', 'content': '/fast'}]",
    f"flag({LAST}) == 'on'",
    f"{LAST} | wordcount > 3",
    f"{LAST}.startswith is callable",
)
THROUGH = (
    f"{{% set text = {LAST} | trim %}}{{% if text == '/fast' %}}a{{% endif %}}",
    f"{{% set ns = namespace(text='') %}}{{% set ns.text = {LAST} %}}{{% if ns.text == '/fast' %}}a{{% endif %}}",
    f"{{% set a, b = {LAST}, '' %}}{{% if a == '/fast' %}}a{{% endif %}}",
    "{% for m in messages | reverse %}{% if m['content'] == '/fast' %}a{% endif %}{% endfor %}",
    f"{{% macro text(x) %}}{{{{ x }}}}{{% endmacro %}}{{% if text({LAST}) == '/fast' %}}a{{% endif %}}",
    f"{{% macro flag(x) %}}{{% if x == '/fast' %}}a{{% endif %}}{{% endmacro %}}{{{{ flag({LAST}) }}}}",
    f"{{% with text = {LAST} %}}{{% if text == '/fast' %}}a{{% endif %}}{{% endwith %}}",
    f"{{% set switch = '/fast' %}}{{% if switch in {LAST} %}}a{{% endif %}}",
)


@pytest.mark.parametrize("condition", KNOWN)
def test_literals_that_change_the_text_around_messages_are_found(condition):
    found = template_switches(f"{{% if {condition} %}}a{{% endif %}}")
    assert found.texts == KNOWN[condition] and not found.equality
    assert all(found.found_in(f"how {text.upper()}?") for text in found.texts)


@pytest.mark.parametrize("condition", UNKNOWN)
def test_other_conditions_on_contents_are_unknown(condition):
    assert template_switches(f"{{% if {condition} %}}a{{% endif %}}") is None


@pytest.mark.parametrize("template", THROUGH)
def test_contents_are_followed_through_variables(template):
    assert template_switches(template).texts == {"/fast"}


def test_messages_that_are_compared_with_one_another():
    assert template_switches("{% for m in messages %}{% if m == messages[-1] %}a{% endif %}{% endfor %}").equality
