"""Chat templates: from messages to one string, as Hugging Face tokenizers do it.

A template is untrusted text that came with a model, so it runs in jinja2's sandbox.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qwen_env.errors import UsageError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    system_prompt: str | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Render `messages` (mappings with `role`, and `content` or `tool_calls`).

    Args:
        system_prompt: put first as a system message, unless the messages begin with one.
        add_generation_prompt: end with what opens the assistant's turn.
        variables: what else the template uses: `bos_token`, `tools`, `enable_thinking`, ...

    Raises:
        UsageError: the messages are malformed, or the template refuses them.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UsageError(f"messages is a {type(messages).__name__}; it must be a list of messages.")
    if not messages:
        raise UsageError("messages is empty; a chat needs at least one message.")
    for index, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or "role" not in message
            or (message.get("content") is None and not message.get("tool_calls"))
        ):
            raise UsageError(
                f"message {index} is {reprlib.repr(message)}; a message is an object with 'role' "
                "and 'content' (which may be left out beside 'tool_calls')."
            )
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        return _compile(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise UsageError(
            f"the chat template fails on these messages: {str(error).rstrip('.')}."
        ) from error


@lru_cache(maxsize=16)
def _compile(template: str) -> "jinja2.Template":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks what the assistant writes, for training on
        chats; here it renders what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: "jinja2.parser.Parser") -> "jinja2.nodes.Node":
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes for HTML, which prompts are not.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
