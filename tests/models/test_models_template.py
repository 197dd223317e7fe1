"""Chat templates: honest ones pass, those that reach for Python's insides are refused unrun."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.models.template import check_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system' }}{% endif %}{{ message.role + message['content'] | trim }}"
    "{% if message.tool_calls is defined %}{{ message['tool_calls'][0] | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
HONEST = {
    "chatml": CHATML,
    "empty": "",
    "generation": "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
    "loop control": "{% for m in x %}{% if m %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "raise": "{{ raise_exception('roles must alternate') }}",
    "namespace": "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}",
    "macro": "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1) }}",
    "filters": "{{ x | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "split": "{{ message.content.split('</think>')[-1].lstrip('\\n') }}",
    "underscore in text": "{{ '<_x>' ~ message.tool_call_id ~ strftime_now('%d') }}__init__",
    "braces in text": "{{ '{\"name\": ' + name + '}' }}",
}


@pytest.mark.parametrize("text", HONEST.values(), ids=HONEST)
def test_honest_templates_pass(text):
    check_template(text)


ESCAPES = {
    "attribute": "{{ ''.__class__.__mro__ }}",
    "item": "{{ x['__class__'] }}",
    "joined item": "{{ x['__cl' ~ 'ass__'] }}",
    "added item": "{{ x['_' + '_class__'] }}",
    "attr": "{{ x | attr('__class__') }}",
    "attr joined": "{{ x | attr('_' ~ '_class__') }}",
    "attr computed": "{{ x | attr(y) }}",
    "attr reversed": "{{ x | attr('__ssalc__' | reverse) }}",
    "map": "{{ [x] | map(attribute='__class__') | list }}",
    "map dotted": "{{ [x] | map(attribute='a.__class__') | list }}",
    "map of attr": "{{ [x] | map('attr', '__class__') | list }}",
    "map of attr computed": "{{ [x] | map('attr', y) | list }}",
    "sort": "{{ [x] | sort(attribute='_x') }}",
    "selectattr": "{{ [x] | selectattr('__class__') | list }}",
    "groupby": "{{ [x] | groupby('__class__') }}",
    "format": "{{ '{0.__class__}'.format(x) }}",
    "format item": "{{ '{x[__class__]}'.format(x=x) }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "in a macro": "{% macro m(x) %}{{ x.__class__ }}{% endmacro %}",
    "in a loop": "{% for x in y.__subclasses__() %}{% endfor %}",
    "in a test": "{% if x is eq(y._z) %}{% endif %}",
    "in a generation": "{% generation %}{{ x.__class__ }}{% endgeneration %}",
    "set": "{% set a = x._y %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "from": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
}


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES)
def test_escapes_are_refused_by_line(text):
    with pytest.raises(ExpertlyError) as error:
        check_template("\n" + text, "folder")
    assert (error.value.code, error.value.exit_code) == ("E311", 3)
    assert error.value.why.startswith("line 2 reaches for _") or "line 2 re" in error.value.why
    assert error.value.fix == "remove or correct the chat template"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% if %}", "is not a Jinja template (TemplateSyntaxError"),
        ("{{", "is not a Jinja template (TemplateSyntaxError"),
        ("{% nonsense %}", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "is not a Jinja template (RecursionError"),
        ("{{ x" + ".y" * 20_000 + " }}", "RecursionError"),
        ("x" * 2**18 + "x", "262145 characters, more than 262144"),
    ],
    ids=["unfinished", "open", "tag", "deep", "long chain", "long"],
)
def test_what_is_no_template_is_one_line(text, said):
    with pytest.raises(ExpertlyError) as error:
        check_template(text)
    assert error.value.code == "E311"
    assert said in error.value.why
    assert len(str(error.value)) < 400


def test_nothing_is_computed():
    check_template("{{ 'a' * 10**12 }}{{ 9**9**9 }}{{ x['a' * 10**12] }}")


@given(st.text(alphabet="{}%#|._[]()'\"~+ xattr\n", max_size=60) | st.text(max_size=40))
def test_no_text_raises_anything_else(text):
    try:
        check_template(text)
    except ExpertlyError as error:
        assert error.code == "E311"
