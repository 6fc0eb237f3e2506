"""Addresses of reward servers, which may hold a password: `http://USER:PASSWORD@HOST:PORT/PATH`."""

import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from qwen_env.errors import UsageError

HIDDEN = "***"
"""What stands for a user and a password where they are not to be seen."""

_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")


class Address(NamedTuple):
    """Where a request goes, and the user and password that it is made with, if any."""

    url: str  # without them
    credentials: tuple[str, str] | None

    @property
    def origin(self) -> tuple[str, str | None, int]:
        """Scheme, host and port: whom one talks to."""
        parts = urlsplit(self.url)
        return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def parse_address(text: str) -> Address:
    """Take an address apart.

    Raises:
        UsageError: it is not one of HTTP; the message does not show a password.
    """
    try:
        parts = urlsplit(text)
        is_right = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not re.search("[^!-~]", text)  # a space, or beyond ASCII
        )
    except (ValueError, AttributeError, TypeError):  # no such port, no text
        is_right = False
    if not is_right:
        raise UsageError(
            f"the reward server is {shown(text)!r}; write it as "
            "'http://HOST:PORT/PATH', percent-encoded."
        )
    if parts.username == HIDDEN:
        raise UsageError(
            f"the user and password of the reward server {text} are not saved with a run; name it "
            "again, with them."
        )
    _, at, host = parts.netloc.rpartition("@")
    credentials = (unquote(parts.username or ""), unquote(parts.password or "")) if at else None
    return Address(urlunsplit(parts._replace(netloc=host)), credentials)


def redacted(text: str) -> str:
    """A reward's name, or any text, with `***` for the user and password of each address in it.

    What is written to files, and what is compared when a run is resumed.
    """
    return _CREDENTIALS.sub(f"{HIDDEN}@", text)


def shown(spec: object) -> object:
    """A reward's name for messages, where it may be no address that can be taken apart.

    In doubt too much is left out: all before the last `@`.
    """
    return re.sub(r"(?s)^(\w+:/+)?.*@", rf"\1{HIDDEN}@", spec) if isinstance(spec, str) else spec
