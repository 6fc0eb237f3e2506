"""A run's card, and its way to a hub that records what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from ppo_jax.config import as_json, preset
from ppo_jax.runs.publishing import check_can_push, model_card, push
from ppo_jax.train import main
from qwen_env import pocket
from qwen_env.errors import RunError, UsageError

TOKEN = "hf_a_secret"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, by hand: three evaluations, of which the second was the best."""
    folder = tmp_path / "run"
    config = as_json(preset("pocket"))
    config["task"] |= {"model": "Qwen/Qwen2.5-0.5B", "prompts": "/home/me/films.jsonl"}
    config["optimizer"]["lora_rank"] = 4
    arguments = "--prompts /home/me/films.jsonl --output-dir ~/runs/x --kl-coef 0.2"
    versions = {"python": "3.11.7", "jax": "0.10.2"}
    folder.mkdir()
    content = config | {"created_by": {"arguments": arguments, "versions": versions}}
    (folder / "config.json").write_text(json.dumps(content))
    scores = {1: None, 2: 0.5, 3: None, 4: 1.25, 5: None, 6: 1.0}
    with (folder / "metrics.jsonl").open("w") as file:
        for iteration, score in scores.items():
            record: dict[str, Any] = {"iteration": iteration}
            if iteration == 1:
                record |= {"baseline/sampled/score": 0.25, "baseline/greedy/score": 0.3}
            if score is not None:
                record |= {"eval/sampled/score": score, "eval/greedy/score": score + 0.1}
                record |= {"eval/num_prompts": 64}
            file.write(json.dumps(record) + "\n")
    (folder / "curves.png").write_bytes(b"a picture")
    for name in ("best", "final"):
        (folder / name / "adapter").mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(f"weights of {name}")
        (folder / name / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def test_the_card_says_what_whoever_finds_it_asks(run: Path) -> None:
    card = model_card(run, "me/films")
    for words in (
        "base_model: Qwen/Qwen2.5-0.5B\n",
        "# films\n",
        "`Qwen/Qwen2.5-0.5B`, trained with adapters of rank 4 on `films.jsonl`",
        "after iteration 4 of 6, the best on held-out prompts",
        "On 64 held-out prompts",
        "| score, sampled | 0.250 | 1.250 |",
        "| score, greedy | 0.300 | 1.350 |",
        "](curves.png)",
        'AutoModelForCausalLM.from_pretrained("me/films")',
        "vllm serve me/films",
        'PeftModel.from_pretrained(base, "me/films", subfolder="adapter")',
        "ppo-train --prompts films.jsonl --output-dir x --kl-coef 0.2",
        '"kl_coef": 0.05',
        "jax 0.10.2",
    ):
        assert words in card, words
    for place in ("/home", "~", str(pocket.REWARD_FOLDER.parent)):
        assert place not in card, "no path of this machine"
    assert f"`flax:{pocket.REWARD_FOLDER.name}`" in card
    assert card == model_card(run, "me/films")


def test_without_a_best_model_it_is_of_the_last(run: Path) -> None:
    (run / "best").rename(run / "elsewhere")
    card = model_card(run, "me/films")
    assert "after iteration 6 of 6." in card
    assert "| score, sampled | 0.250 | 1.000 |" in card


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """The requests that a stand-in for the hub got: path and content."""
    requests: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            lines = [json.loads(line) for line in body.splitlines()]
            requests.append((self.path, lines))
            assert self.headers["Authorization"] == f"Bearer {TOKEN}"
            answer: Any = {"url": f"{address}/me/films", "name": "me/films", "id": "me/films"}
            if "preupload" in self.path:
                names = [file["path"] for file in lines[0]["files"]]
                answer = {
                    "files": [
                        {"path": name, "uploadMode": "regular", "shouldIgnore": False}
                        for name in names
                    ]
                }
            if "/commit/" in self.path:
                answer = {"commitUrl": f"{address}/me/films/commit/1", "commitOid": "1"}
            content = json.dumps(answer).encode()
            self.send_response(403 if "refused" in str(lines) + self.path else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_commit_holds_it_all(run: Path, hub: list[tuple[str, Any]]) -> None:
    assert push(run, "me/films").endswith("/me/films")
    (commit,) = [lines for path, lines in hub if "/commit/" in path]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in commit
        if line["key"] == "file"
    }
    assert files["model.safetensors"] == b"weights of best"
    assert files["README.md"].decode() == model_card(run, "me/films")
    assert files.keys() == {
        "README.md",
        "curves.png",
        "model.safetensors",
        "adapter/adapter_config.json",
    }


def test_a_failed_push_loses_nothing(run: Path, hub: list[tuple[str, Any]]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunError) as error:
        push(run, "me/refused")
    said = str(error.value)
    assert f"push it again with: ppo-train --output-dir {run} --resume --push-to-hub" in said
    assert TOKEN not in said and "\n" not in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_before_training_there_are_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as exit:
        main(["--output-dir", str(tmp_path / "run"), "--push-to-hub", "me/films"])
    assert exit.value.code == 2
    assert "no credentials to push to me/films with; log in with: hf auth" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"push_to_hub is 'films'; it must be USER/NAME"):
        check_can_push("films")
