"""A reward server for the tests: rewards are lengths; the path says how it misbehaves.

`/flaky` answers 503 to every first and second request of three, `..._at_first` misbehaves on its
first request alone, `/slow` and `/drip...` never come to an end in time.
"""

import base64
import gzip
import json
import socket
import ssl
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

num_requests = 0
seen_paths = set()
AUTHORIZATION = "Basic " + base64.b64encode("user:p@ss wörd".encode()).decode()
BOMB = gzip.compress(b" " * 10**7)
ESCAPE = "\x1b[2J\x07"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        global num_requests
        path, query = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
        num_requests += path == "/flaky"
        is_first = path not in seen_paths
        seen_paths.add(path)
        text = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(text)
        lengths = [len(text) for text in body["completions"]]
        answer = {"rewards": lengths, "components": {"batch": [float(len(lengths))] * len(lengths)}}
        right = json.dumps(answer).encode()
        if path == "/slow" or (path == "/slow_at_first" and is_first):
            time.sleep(1)
        elif path == "/flaky" and num_requests % 3:
            return self.reply(503, b"warming up")
        elif path == "/stars":
            answer = {"rewards": [row["stars"] for row in body["rows"]]}
        elif path == "/short":
            answer["rewards"] = answer["rewards"][1:]
        elif path == "/nan":
            answer["rewards"][1] = float("nan")
        elif path == "/words":
            answer["rewards"][1] = "b"
        elif path == "/bare_list":
            answer = lengths
        elif path == "/bare_text":
            answer = ESCAPE
        elif path == "/short_components":
            answer["components"] = {"batch": [1.0]}
        elif path == "/list_components":
            answer["components"] = lengths
        elif path == "/own_score":
            answer["components"] = {"score": lengths}
        elif path == "/escape_component":
            answer["components"] = {ESCAPE: lengths}
        elif path == "/moody" and len(lengths) == 1:
            answer["components"] = {"another": lengths}
        elif path == "/hangs_up_at_first" and is_first:
            self.close_connection = True
            return None
        elif path == "/text":
            return self.reply(200, b"hello")
        elif path == "/deep":
            return self.reply(200, b"[" * 100_000)
        elif path == "/refuses":
            return self.reply(400, b"no such model")
        elif path == "/escape":
            return self.reply(400, ESCAPE.encode())
        elif path.startswith("/later_at_first") and is_first:
            return self.reply(503, b"busy", Retry_After=query["pause"])
        elif path == "/password":
            answer = {"rewards": [float(self.headers["Authorization"] == AUTHORIZATION)]}
        elif path == "/no_password":
            answer = {"rewards": [float(self.headers["Authorization"] is None)]}
        elif path == "/moved":
            return self.reply(int(query["status"]), b"", Location=query["to"])
        elif path == "/circle":
            return self.reply(308, b"", Location="/circle")
        elif path == "/rows":
            strict = json.loads(text, parse_constant=lambda name: 1 / 0)["rows"]
            answer = {"rewards": [0.0], "components": {json.dumps(strict[0]): [1.0]}}
        elif path == "/messages":
            answer = {"rewards": [len(talk) for talk in body.get("messages", [[]])]}
        elif path == "/gzip":
            return self.reply(200, gzip.compress(right), Content_Encoding="gzip")
        elif path == "/bad_gzip":
            return self.reply(200, right, Content_Encoding="gzip")
        elif path == "/bomb":
            return self.reply(200, BOMB, Content_Encoding="gzip")
        elif path == "/byte_order_mark":
            return self.reply(200, b"\xef\xbb\xbf" + right)
        elif path in RAW:
            self.close_connection = True
            return RAW[path](self.wfile.write, right, self.connection)
        return self.reply(200, json.dumps(answer).encode())

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def chunked(write, right, _):
    write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(right), 7):
        part = right[start : start + 7]
        write(b"%x\r\n%s\r\n" % (len(part), part))
    write(b"0\r\n\r\n")


def bad_chunk(write, right, _):
    write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + right)


def promises_more(write, right, _):
    write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(right) + 1, right))


def promises_less(write, right, _):
    write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(right) - 1, right))


def resets(write, right, connection):
    write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(right), right[:9]))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def not_http(write, right, _):
    write(b"SSH-2.0-OpenSSH_9.6\r\n")


def drips(write, right, _):
    write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        write(b" ")
        time.sleep(0.02)


def drips_headers(write, right, _):
    write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        write(b"x")
        time.sleep(0.02)


def endless_headers(write, right, _):
    write(b"HTTP/1.1 200 OK\r\n")
    while True:
        write(b"X: y\r\n" * 1000)


def endless_status(write, right, _):
    while True:
        write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def endless_body(write, right, _):
    write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        write(b" " * 2**16)


RAW = {
    f"/{function.__name__}": function
    for function in (
        chunked, bad_chunk, promises_more, promises_less, resets, not_http, drips, drips_headers,
        endless_headers, endless_status, endless_body,
    )
}  # fmt: skip


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # of clients that have seen enough


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    if sys.argv[1:] == ["--tls"]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(__file__).with_name("localhost.pem"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_port, flush=True)
    server.serve_forever()
