"""Chats are rendered as transformers renders them, and end."""

import json
import subprocess
import sys
import textwrap

import pytest
import transformers

from qwen_env import watchdog
from qwen_env.errors import UsageError
from qwen_env.tokenizer import load_tokenizer

USER = [{"role": "user", "content": "hi"}]
DRAFT = [*USER, {"role": "assistant", "content": "The plot was "}]
ROLES = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
QWEN = """{%- if tools %}# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
{% endif %}{% if documents is not none %}{{ documents | length }} documents
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}


@pytest.fixture
def tokenizers(folder):
    """Ours and theirs of one folder."""
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def render(folder):
    return load_tokenizer(folder).apply_chat_template


@pytest.mark.parametrize(
    ("messages", "arguments"),
    [
        (USER, {}),
        (USER, {"add_generation_prompt": False}),
        (USER, {"enable_thinking": False}),
        (USER, {"tools": [TOOL]}),
        (USER, {"tools": [TOOL], "documents": [{"title": "t", "text": "x"}]}),
        (USER, {"documents": []}),
        (DRAFT, {"continue_final_message": True}),
        (DRAFT, {"continue_final_message": True, "add_generation_prompt": False}),
        (
            [*USER, {"role": "assistant", "content": "", "reasoning_content": "Hm"}],
            {"continue_final_message": "reasoning_content", "chat_template": QWEN},
        ),
        ([*USER, CALL, {"role": "tool", "content": "naïve <b>"}], {}),
        ([*USER, CALL | {"content": None}], {}),
    ],
)
@pytest.mark.parametrize("template", [QWEN, None])
def test_every_argument_means_what_it_means_there(tokenizers, template, messages, arguments):
    ours, theirs = tokenizers
    arguments = {"chat_template": template} | arguments
    default = {"add_generation_prompt": "continue_final_message" not in arguments}
    expected = theirs.apply_chat_template(messages, tokenize=False, **(default | arguments))
    assert ours.apply_chat_template(messages, **arguments) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none %}TOOLS{% endif %}{{ messages[0].content }}",
        "{% if documents is not none %}{{ documents | length }}{% endif %}",
        "{{ bos_token is defined }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token is defined }}",
        """{% for m in messages %}
    {% if m.role == 'assistant' %}
        {% generation %}
        {% set text = m.content | trim %}
        {{ loop.index }} {{ text }}{{ eos_token }}
        {% endgeneration %}
    {% else %}{{ text is defined }} {{ m.content }}
    {% endif %}
{% endfor %}""",
        "{% for m in messages %}{{ m.role }}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=1) }}",
        "{{ messages | tojson(ensure_ascii=true, separators=[',', ':'], sort_keys=true) }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_templates_of_all_sorts(tokenizers, template):
    ours, theirs = tokenizers
    messages = [*USER, {"role": "assistant", "content": " naïve <b> "}, *USER]
    assert ours.apply_chat_template(messages, chat_template=template) == theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def test_a_function_as_a_tool(tokenizers):
    def look(place: str) -> str:
        """
        Look at a place.

        Args:
            place: Where.
        """
        return place

    ours, theirs = tokenizers
    expected = theirs.apply_chat_template(
        USER, tools=[look], chat_template=QWEN, tokenize=False, add_generation_prompt=True
    )
    assert "Look at a place" in expected
    assert ours.apply_chat_template(USER, tools=[look], chat_template=QWEN) == expected


def test_templates_by_name(folder):
    path = folder / "tokenizer_config.json"
    named = {"default": "D", "tool_use": "T{{ tools | length }}", "rag": "R{{ documents }}"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for arguments in (
        {},
        {"tools": [TOOL]},
        {"chat_template": "rag"},
        {"chat_template": "{{ 1 }}"},
    ):
        assert ours.apply_chat_template(USER, **arguments) == theirs.apply_chat_template(
            USER, tokenize=False, **arguments
        )
    with pytest.raises(
        UsageError, match=r"'rug', which is neither .* 'default', 'tool_use', 'rag'"
    ):
        ours.apply_chat_template(USER, chat_template="rug")
    ours.save(folder)
    assert load_tokenizer(folder).apply_chat_template(USER, chat_template="rag") == "RNone"


def test_a_tokenizer_of_transformers_renders_its_own_chats(folder):
    class Shouting(transformers.PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **arguments):
            return super().apply_chat_template(*args, **arguments).upper()

    assert (
        load_tokenizer(Shouting.from_pretrained(folder)).apply_chat_template(
            USER, chat_template=ROLES
        )
        == "USER:HI;"
    )


def test_the_system_prompt_goes_first_unless_there_is_one(render):
    assert render(USER, chat_template=ROLES, system_prompt="short") == "system:short;user:hi;"
    messages = [{"role": "system", "content": "mine"}, *USER]
    assert render(messages, chat_template=ROLES, system_prompt="short") == "system:mine;user:hi;"
    assert USER == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("messages", "arguments", "message"),
    [
        (USER, {"chat_template": "{{ raise_exception('take\nturns.') }}"}, "messages: take.$"),
        (USER, {"chat_template": "{% for %}"}, "the chat template fails"),
        (USER, {"chat_template": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
        (USER, {"chat_template": "roles"}, "'roles', which is neither a template nor .* none with"),
        (USER, {"tools": ["look"]}, "Tools should either be a JSON schema"),
        (USER, {"documents": ["x"]}, "Documents should be a list of dicts"),
        (USER, {"continue_final_message": True, "add_generation_prompt": True}, "not compatible"),
        ([*USER, CALL], {"continue_final_message": True}, 'the final message has no "content"'),
        ([], {}, "messages is empty"),
        ("hi", {}, "messages is a str; it must be a list"),
        (["hi"], {}, "message 0 is 'hi'"),
        ([*USER, {"content": "no role"}], {}, "message 1 is"),
        ([{"role": "user", "contents": "hi"}], {}, "message 0 is .*'contents': 'hi'.*; a mess"),
        ([{"role": "user", "content": None}], {}, "message 0 is .*'content': None.*; a message"),
        ([{"role": "user", "content": None, "tool_calls": []}], {}, "message 0 is"),
        (USER, {"chat_template": "{{ messages[0].content + 5 }}"}, "can only concatenate str"),
    ],
)  # fmt: skip
def test_what_is_refused(render, messages, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        render(messages, **({"chat_template": ROLES} | arguments))
    assert "\n" not in str(caught.value)


def test_without_a_template(backend):
    with pytest.raises(UsageError, match="the tokenizer has no chat template; pass one"):
        load_tokenizer(backend).apply_chat_template(USER)


def test_a_long_message_is_not_printed_whole(render):
    with pytest.raises(UsageError) as caught:
        render([{"contents": "word " * 10_000}])
    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError) as caught:
        render(USER, chat_template="{{ raise_exception('word ' * 10000) }}")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(99) }}",
    ],
)
def test_a_template_that_never_ends(render, body, monkeypatch):
    monkeypatch.setattr(watchdog, "SECONDS", 0.3)
    with pytest.raises(UsageError, match=r"does not come to an end .*: it took more than 0.3 sec"):
        render(USER, chat_template=body)
    assert render(USER, chat_template=ROLES) == "user:hi;"


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(10**9) %}x{% endfor %}",  # the sandbox's own limit
        "{{ 'x' * 10**13 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 10**5 + ")" * 10**5 + " }}",
        # It doubles until the limit of memory that the test sets.
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}",
    ],
)
def test_a_template_that_grows_without_end(render, body, monkeypatch):
    monkeypatch.setattr(watchdog, "BYTES", 2**26)
    before = watchdog._peak_memory()
    with pytest.raises(UsageError, match=r"the chat template (fails|does not come to an end)"):
        render(USER, chat_template=body)
    assert watchdog._peak_memory() - before < 2**31


def test_without_pytorch_nothing_is_missing_and_nothing_is_said():
    code = """
        import sys
        sys.modules["torch"] = None  # as if it were not installed
        from qwen_env import pocket
        from qwen_env.tokenizer import load_tokenizer
        tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
        assert "transformers" not in sys.modules
        print(tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], chat_template="{{ messages[0].content }}"
        ))
        import transformers
        assert not transformers.utils.is_torch_available()
        theirs = transformers.AutoTokenizer.from_pretrained(pocket.POLICY_FOLDER)
        print(load_tokenizer(theirs).encode("the") == tokenizer.encode("the"))
        """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("hi\nTrue\n", "")
