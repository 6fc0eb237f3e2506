"""A run's model on the Hugging Face hub, with a card that is made from the run's folder."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ppo_jax.runs.records import Record, RecordFile
from qwen_env.errors import RunError, UsageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MEASURES = {
    "accuracy": "accuracy",
    "score": "score",
    "gold": "gold score",
    "length_mean": "length, tokens",
}


def check_can_push(repository: str) -> None:
    """Before a run, so that it does not end in vain.

    Raises:
        UsageError: it is no name of a repository, or there are no credentials.
    """
    from huggingface_hub import get_token

    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"push_to_hub is {repository!r}; it must be USER/NAME.")
    if get_token() is None:
        raise UsageError(
            f"There are no credentials to push to {repository} with; log in with: hf auth login, "
            "or leave push_to_hub out."
        )


def push(run: Path, repository: str) -> str:
    """Upload the best model of the run in a folder, or else its final one, with its card and
    curves, in one commit to a repository that is made if need be; returns its address.

    Raises:
        RunError: the hub cannot be reached or does not take it. The run stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    model = published(run)
    files = [path for path in sorted(model.rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(path.relative_to(model).as_posix(), path) for path in files]
    operations.append(CommitOperationAdd("README.md", model_card(run, repository).encode()))
    if (run / "curves.png").exists():
        operations.append(CommitOperationAdd("curves.png", run / "curves.png"))
    try:
        api = HfApi()
        address = str(api.create_repo(repository, exist_ok=True))
        api.create_commit(repository, operations, commit_message=f"Upload {model.name} of a run")
    except Exception as error:  # each package that reaches the network has its own
        what = str(error).strip().split("\n")[0].replace(get_token() or "***", "***").rstrip(".")
        raise RunError(
            f"{model} could not be pushed to {repository}: {type(error).__name__}: {what}. It is "
            f"saved; push it again with: ppo-train --output-dir {run} --resume --push-to-hub "
            f"{repository}"
        ) from error
    return address


def published(run: Path) -> Path:
    """The folder of the model that is pushed."""
    return run / "best" if (run / "best").is_dir() else run / "final"


def model_card(run: Path, repository: str) -> str:
    """What was trained on what, how well it does, how to load it, and with which settings.

    Paths of this machine are left out, but for their last part.
    """
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    metrics = RecordFile(run / "metrics.jsonl").read()
    task, optimizer = config["task"], config["optimizer"]
    model = published(run)
    evaluated = [record for record in metrics if "eval/sampled/score" in record]
    key = (
        (lambda r: r["eval/sampled/score"]) if model.name == "best" else (lambda r: r["iteration"])
    )
    last = max(evaluated, key=key, default=None)
    base, is_hub_id = _shown(task["model"]), not Path(task["model"]).exists()
    prompts = _shown(task["task"] or task["prompts"])
    how = f"adapters of rank {r}" if (r := optimizer.get("lora_rank")) else "PPO"
    parts = [
        _front_matter(base if is_hub_id else None),
        f"# {repository.partition('/')[2]}",
        f"`{base}`, trained with {how} on `{prompts}`; the reward was "
        f"`{_shown(task['reward'] or task['task'])}`. This is the model after iteration "
        f"{last['iteration'] if last else '?'} of {metrics[-1]['iteration'] if metrics else 0}"
        + (", the best on held-out prompts." if model.name == "best" else "."),
        _before_and_after(metrics[0] if metrics else {}, last or {}),
        "![Curves of the run](curves.png)" if (run / "curves.png").exists() else "",
        _loading(repository, (model / "adapter").is_dir(), is_hub_id, base),
        "## Settings\n\n"
        f"```sh\nppo-train {_arguments(config)}\n```\n\n"
        f"```json\n{json.dumps(_settings(config), indent=2)}\n```",
        "## Versions\n\n"
        + ", ".join(
            f"{k} {v}" for k, v in config.get("created_by", {}).get("versions", {}).items()
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str | None) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base is not None:
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "tags: [ppo, reinforcement-learning, jax]", "---"])


def _before_and_after(first: Record, last: Record) -> str:
    rows = []
    for decoding in ("sampled", "greedy"):
        for name, words in _MEASURES.items():
            before = first.get(f"baseline/{decoding}/{name}")
            after = last.get(f"eval/{decoding}/{name}")
            if before is not None and after is not None:
                rows.append(f"| {words}, {decoding} | {before:.3f} | {after:.3f} |")
    if not rows:
        return ""
    count = int(last.get("eval/num_prompts", 0))
    head = f"On {count} held-out prompts:\n\n| | before | after |\n|---|---|---|\n"
    return "## Before and after\n\n" + head + "\n".join(rows)


def _loading(repository: str, has_adapter: bool, is_hub_id: bool, base: str) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        f'model = AutoModelForCausalLM.from_pretrained("{repository}")',
    ]
    text = "## How to load it\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
    text += f"or `vllm serve {repository}`."
    if has_adapter and is_hub_id:
        text += (
            f" The adapter alone, for `peft` on `{base}`: "
            f'`PeftModel.from_pretrained(base, "{repository}", subfolder="adapter")`.'
        )
    return text


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        group: {name: _shown(value) for name, value in fields.items()}
        for group, fields in config.items()
        if group in ("task", "ppo", "optimizer", "run")
    }


def _arguments(config: dict[str, Any]) -> str:
    words = shlex.split(config.get("created_by", {}).get("arguments", ""))
    return shlex.join(map(_shown, words))


def _shown(value: Any) -> Any:
    """A path without the folders of this machine, which may stand in a text; else as it is."""
    if not isinstance(value, str):
        return value
    path = r"(?<![\w/.~])(~|\.{1,2})?/(?!/)[^\s\"']+"  # no part of a URL
    return re.sub(path, lambda found: Path(found[0]).name, value)
