"""A reward server for the tests: rewards are lengths; the path says how it misbehaves.

`/flaky` answers 503 to every first and second request of three, `/slow` answers too late.
"""

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

num_requests = 0


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        global num_requests
        num_requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        lengths = [len(text) for text in body["completions"]]
        answer = {"rewards": lengths, "components": {"batch": [float(len(lengths))] * len(lengths)}}
        if self.path == "/slow":
            time.sleep(1)
        elif self.path == "/flaky" and num_requests % 3:
            return self.reply(503, b"warming up")
        elif self.path == "/stars":
            answer = {"rewards": [row["stars"] for row in body["rows"]]}
        elif self.path == "/short":
            answer["rewards"] = answer["rewards"][1:]
        elif self.path == "/nan":
            answer["rewards"][1] = float("nan")
        elif self.path == "/text":
            return self.reply(200, b"hello")
        elif self.path == "/refuses":
            return self.reply(400, b"no such model")
        return self.reply(200, json.dumps(answer).encode())

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
