"""One POST over HTTP, bounded in time and in size."""

import io
import socket
import time
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

_LARGEST_ERROR = 2000  # bytes that are read of an answer that is none


class Answer(NamedTuple):
    """What a server said."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, seconds: float, largest: int
) -> Answer:
    """POST `body` to `url`, without the user and password that it may hold, on a new connection.

    Redirects are not followed. The environment's proxies are used, except for this machine itself.

    Args:
        seconds: to wait for the whole answer, however it trickles in.
        largest: bytes that an answer with status 200 may have, unpacked.

    Raises:
        TimeoutError: the answer is not there in time.
        OverflowError: it is too large.
        urllib3.exceptions.HTTPError: there is no connection, or it broke off, or the answer is not
            HTTP, not as long as it says, or wrongly packed.
    """
    with _manager(url) as manager:
        # A socket's own limit is for two bytes; that for all of them is the connection's.
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        try:
            response = manager.request(
                "POST",
                url,
                body=body,
                headers=headers,
                timeout=seconds,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            with response:
                limit = largest if response.status == 200 else _LARGEST_ERROR
                content = response.read(limit + 1)
        except urllib3.exceptions.NewConnectionError:  # which counts as a timeout there
            raise
        except urllib3.exceptions.TimeoutError as error:
            raise TimeoutError("timed out") from error
    if len(content) > limit and response.status == 200:
        raise OverflowError(f"the answer has more than {largest} bytes")
    return Answer(response.status, response.reason or "", response.headers, content)


def _manager(url: str) -> urllib3.PoolManager:
    parts = urlsplit(url)
    host = str(parts.hostname)
    proxy = urllib.request.getproxies().get(parts.scheme)
    is_here = host == "localhost" or host.startswith("127.") or host == "::1"
    if proxy is None or is_here or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager()
    proxy_parts = urllib3.util.parse_url(proxy)
    headers = urllib3.make_headers(proxy_basic_auth=proxy_parts.auth)
    return urllib3.ProxyManager(proxy, proxy_headers=headers)


class _TimedReader(io.RawIOBase):
    """What comes from a socket, until a point in time."""

    def __init__(self, sock: Any, deadline: float):
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        read: int | None = self._raw.readinto(buffer)
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """A socket whose readers stop at a point in time."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._sock, self._deadline = sock, deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))


class _Timed:
    """A connection for one answer, which must be there `timeout` seconds after connecting began."""

    timeout: Any
    sock: Any

    def connect(self) -> None:
        deadline = time.monotonic() + self.timeout
        super().connect()  # type: ignore[misc]
        self.sock = _TimedSocket(self.sock, deadline)


class _HTTP(_Timed, HTTPConnection):
    pass


class _HTTPS(_Timed, HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPS
