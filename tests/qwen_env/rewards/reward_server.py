"""A reward server for the tests: rewards are lengths; the path says how it misbehaves.

`/flaky` answers 503 to every first and second request of three, `/slow` answers too late,
`..._at_first` misbehaves on its first request alone.
"""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

num_requests = 0
seen_paths = set()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        global num_requests
        num_requests += self.path == "/flaky"
        is_first = self.path not in seen_paths
        seen_paths.add(self.path)
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
        elif self.path == "/words":
            answer["rewards"][1] = "b"
        elif self.path == "/bare_list":
            answer = lengths
        elif self.path == "/short_components":
            answer["components"] = {"batch": [1.0]}
        elif self.path == "/list_components":
            answer["components"] = lengths
        elif self.path == "/own_score":
            answer["components"] = {"score": lengths}
        elif self.path == "/moody" and len(lengths) == 1:
            answer["components"] = {"another": lengths}
        elif self.path == "/slow_at_first" and is_first:
            time.sleep(1)
        elif self.path == "/hangs_up_at_first" and is_first:
            return self.connection.close()
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
