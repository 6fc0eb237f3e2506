import pytest
import transformers

from qwen_env.errors import UsageError
from qwen_env.tokenizer.chat_template import render_chat

USER = [{"role": "user", "content": "hi"}]
ROLES = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def test_the_system_prompt_goes_first_unless_there_is_one():
    assert render_chat(ROLES, USER, system_prompt="be brief") == "system:be brief;user:hi;"
    messages = [{"role": "system", "content": "mine"}, *USER]
    assert render_chat(ROLES, messages, system_prompt="be brief") == "system:mine;user:hi;"
    assert USER == [{"role": "user", "content": "hi"}]


def test_what_templates_of_models_use():
    template = "{% if x %}\n  {{ {'a': '<é>'} | tojson }}\n{% break %}{% endif %}"
    loop = "{% for m in messages %}" + template + "{% endfor %}"
    assert render_chat(loop, USER, x=True).strip() == '{"a": "<é>"}'
    assert len(render_chat("{{ strftime_now('%Y') }}", USER)) == 4


@pytest.mark.parametrize(
    "template",
    [
        # As in templates for training on chats: blocks on lines of their own, and in one line.
        """{% for m in messages %}
    {% if m.role == 'assistant' %}
        {% generation %}
        {% set text = m.content | trim %}
        {{ loop.index }} {{ text }}{{ eos_token }}
        {% endgeneration %}
    {% else %}{{ text is defined }} {{ m.content }}
    {% endif %}
{% endfor %}""",
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=1) }}",
        "{{ messages | tojson(ensure_ascii=true, separators=[',', ':'], sort_keys=true) }}",
        "{{ messages | tojson(true, 2, (', ', ' = '), true) }}",
    ],
)
def test_templates_render_as_in_transformers(template, backend):
    messages = [*USER, {"role": "assistant", "content": " naïve <b> "}, *USER]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert "ve <b>" in expected
    ours = render_chat(template, messages, add_generation_prompt=False, eos_token="</s>")
    assert ours == expected


def test_a_call_of_a_tool_may_stand_in_for_the_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    template = "{{ messages[1].tool_calls[0].function.name }}"
    assert render_chat(template, [*USER, call]) == "f"
    assert render_chat(template, [*USER, call | {"content": None}]) == "f"


def test_the_generation_prompt():
    template = "{{ 'go' if add_generation_prompt else 'stop' }}"
    assert render_chat(template, USER) == "go"
    assert render_chat(template, USER, add_generation_prompt=False) == "stop"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", USER, "roles must alternate"),
        ("{% for %}", USER, "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", USER, "unsafe"),
        (ROLES, [], "messages is empty"),
        (ROLES, ["hi"], "message 0 is 'hi'"),
        (ROLES, [*USER, {"content": "no role"}], "message 1 is"),
        (ROLES, [{"role": "user", "contents": "hi"}], "message 0 is .*'contents': 'hi'.*; a mess"),
        (ROLES, [{"role": "user", "content": None}], "message 0 is .*'content': None.*; a message"),
        (ROLES, [{"role": "user", "content": None, "tool_calls": []}], "message 0 is"),
    ],
)
def test_what_is_refused(template, messages, message):
    with pytest.raises(UsageError, match=message):
        render_chat(template, messages)


def test_a_long_message_is_not_printed_whole():
    with pytest.raises(UsageError) as caught:
        render_chat(ROLES, [{"contents": "word " * 10_000}])
    assert len(str(caught.value)) < 200
