"""How much of the return could a value function explain on the pocket task, and how much does ours?

    python benchmarks/learning_value.py --output-dir runs/learning

From every state of some held-out responses the policy writes many continuations. The returns G of
one state's continuations differ by chance alone, which no value function can foresee; their means
differ from state to state by what it could:

    attainable = Var(E[G | state]) / Var(G)

(estimated without the bias of a finite number of continuations, as in a one-way analysis of
variance). Beside it, for the same states and returns, the share that the trained value function
explains: 1 - Var(G - V) / Var(G). Both for the untrained policy and for the trained one, whose
value function is PPO's, and others that were trained on for a while with the policy held still.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from learning.runs import Bench
from learning.settings import SETTINGS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_jax.actor import Actor, Episodes
from ppo_jax.agent import PPOAgent
from ppo_jax.cli import errors_as_sentences, keep_compiled_programs, parse
from ppo_jax.models import PolicyValueNetwork
from ppo_jax.models.response import ResponseOutputs, response_outputs
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.prompts import Prompt
from qwen_env.task import TextTask, make_task

ROWS = 256  # continuations that are drawn at one time
MIN_STATES = 16  # at a position, for a variance of them
COLORS = "black", "#d55e00", "#0072b2", "#009e73"


@dataclass(frozen=True)
class Arguments:
    """What a value function could explain, and what ours does."""

    output_dir: Path = Path("runs/learning")
    """Folder that gets value.json and value.png."""
    iterations: int = 30
    """Iterations of PPO, and then of each critic with the policy held still."""
    prompts: int = 64
    """Held-out prompts; one response to each gives the states."""
    continuations: int = 32
    """Of each state."""
    seed: int = 0
    """Root of every random choice."""


class States(NamedTuple):
    """N states and the returns of their continuations."""

    position: np.ndarray  # int [N], response tokens written
    returns: np.ndarray  # float [N, continuations]
    values: dict[str, np.ndarray]  # float [N], by critic


def main() -> None:
    with errors_as_sentences():
        arguments = parse(Arguments, sys.argv[1:], prog="python benchmarks/learning_value.py")
        keep_compiled_programs()
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        report = {name: explained(states) for name, states in study(arguments).items()}
        for name, content in report.items():
            print(f"{name}: {content['all']}")
        (arguments.output_dir / "value.json").write_text(json.dumps(report, indent=1))
        plot(report, arguments.output_dir / "value.png")


def study(arguments: Arguments) -> dict[str, States]:
    """States of the untrained and of the trained policy."""
    bench = Bench()
    prompts = bench.held_out[: arguments.prompts]
    agent = bench.agent(SETTINGS[0].config(arguments.iterations, arguments.seed))
    bench_task, reference = bench.task, agent.initial_backbone
    before = states_of(agent.network, {}, bench_task, reference, prompts, arguments)
    for _, metrics in agent.learn():
        print(f"PPO {agent.iteration}: EV {metrics['value/explained_variance']:.2f}", flush=True)
    policy = agent.network
    critics: dict[str, PolicyValueNetwork] = {"PPO's value function": policy}
    for name, critic in (("head, trained on", "stopped"), ("critic, trained on", "separate")):
        critics[name] = trained_on(policy, agent, critic, arguments.iterations)
    after = states_of(policy, critics, bench_task, reference, prompts, arguments)
    return {"untrained policy": before, "trained policy": after}


def trained_on(
    policy: PolicyValueNetwork, agent: PPOAgent, critic: Any, iterations: int
) -> PolicyValueNetwork:
    """The value function after `iterations` more in which the policy does not change.

    Args:
        critic: "stopped" trains the head alone, "separate" a backbone of its own as well.
    """
    config = agent.config
    held = PPOAgent(
        policy,
        agent.task,
        replace(
            config,
            ppo=replace(config.ppo, critic=critic),
            optimizer=replace(config.optimizer, critic_warmup_iterations=iterations),
            run=replace(config.run, num_iterations=iterations + 1, seed=config.run.seed + 1),
        ),
        iterations + 1,
    )
    held.initial_backbone = agent.initial_backbone  # the returns are penalised as they were
    for _, metrics in held.learn():
        explained = metrics["value/explained_variance"]
        print(f"{critic} {held.iteration}: EV {explained:.2f}", flush=True)
        if held.iteration == iterations:
            break
    return held.network


def states_of(
    policy: PolicyValueNetwork,
    critics: dict[str, PolicyValueNetwork],
    task: TextTask,
    reference: nnx.State,
    prompts: Sequence[Prompt],
    arguments: Arguments,
) -> States:
    """Every state of one response to each prompt, with the returns of its continuations."""
    key = jax.random.fold_in(jax.random.key(arguments.seed), 2_000_000)
    params = nnx.state(policy)
    first = Actor(policy, task, Sampling()).respond(params, prompts, key)
    prefixes = [
        Prompt("", np.concatenate([episode.prompt.ids, episode.completion_ids[:t]]), {}, 0)
        for episode in first.episodes
        for t in range(len(episode.completion_ids))
    ]
    rows, columns = np.nonzero(written(first.rollout.state, task.rules.max_new_tokens))
    longer = make_task(
        tokenizer=task.tokenizer,
        prompts=["unused"],
        reward=task.reward,
        max_prompt_length=task.rules.max_length,
        max_new_tokens=task.rules.max_new_tokens,
        vocab_size=task.rules.vocab_size,
    )
    actor, per_call = Actor(policy, longer, Sampling()), ROWS // arguments.continuations
    beta, returns = SETTINGS[0].config(1, 0).ppo.kl_coef, []
    for start in range(0, len(prefixes), per_call):
        here = prefixes[start : start + per_call]
        done = actor.respond(
            params,
            here + here[-1:] * (per_call - len(here)),
            jax.random.fold_in(key, start),
            completions_per_prompt=arguments.continuations,
        )
        log_ratio = kl_of(done, policy, reference, longer)
        returns.append((done.scores - beta * log_ratio).reshape(per_call, -1)[: len(here)])
    values = {
        name: np.asarray(outputs(critic, nnx.state(critic), first, task).values)[rows, columns]
        for name, critic in critics.items()
    }
    return States(columns, np.concatenate(returns), values)


def outputs(
    network: PolicyValueNetwork, params: nnx.State, done: Episodes, task: TextTask
) -> ResponseOutputs:
    """What `network` with `params` says of finished episodes."""
    state = done.rollout.state
    return _outputs(
        nnx.graphdef(network), task.rules, params, state.tokens, state.prompt_length, state.length
    )


@partial(jax.jit, static_argnums=(0, 1))
def _outputs(graphdef: Any, rules: mdp.Rules, params: nnx.State, *state: Array) -> ResponseOutputs:
    network, steps = nnx.merge(graphdef, params), rules.max_new_tokens
    return response_outputs(network, *state, rules=rules, sampling=Sampling(), num_steps=steps)


def kl_of(
    done: Episodes, policy: PolicyValueNetwork, reference: nnx.State, task: TextTask
) -> np.ndarray:
    """log policy - log reference of each row's response, float [N]."""
    params = nnx.State({**nnx.state(policy), "backbone": reference})
    under_reference = outputs(policy, params, done, task).logprobs
    mask = written(done.rollout.state, task.rules.max_new_tokens)
    return np.where(mask, done.rollout.logprobs - under_reference, 0.0).sum(-1)


def written(state: mdp.State, num_steps: int) -> np.ndarray:
    """bool [N, T]: where a response token is."""
    return np.arange(num_steps) < np.asarray(mdp.response_length(state))[:, None]


def explained(states: States) -> dict[str, Any]:
    """Variances and explained shares, over all states and for each position."""

    def of(rows: np.ndarray) -> dict[str, float]:
        returns = states.returns[rows]
        within = returns.var(axis=1, ddof=1).mean()
        means = returns.mean(axis=1)
        between = max(means.var() - within / returns.shape[1], 0.0)
        shares = {"attainable": between / (between + within)}
        for name, values in states.values.items():
            bias = means - values[rows]
            unexplained = within + max(bias.var() - within / returns.shape[1], 0.0)
            shares[name] = 1 - unexplained / (between + within)
        return {"states": len(means), "std": float(np.sqrt(between + within))} | {
            name: float(share) for name, share in shares.items()
        }

    everywhere = {"all": of(np.ones(len(states.position), bool))}
    counts = np.bincount(states.position)
    positions = np.flatnonzero(counts >= MIN_STATES)
    return everywhere | {str(t): of(states.position == t) for t in positions}


def plot(report: dict[str, Any], path: Path) -> None:
    """The shares by position, a panel for each policy."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (policy, content) in zip(
        figure.subplots(1, 2, sharey=True), report.items(), strict=True
    ):
        positions = [int(name) for name in content if name != "all"]
        names = [name for name in content["all"] if name not in ("states", "std")]
        for name, color in zip(names, COLORS, strict=False):
            shares = [content[str(t)][name] for t in positions]
            label = f"{name} (all states: {content['all'][name]:.2f})"
            axis.plot(positions, shares, "o-", ms=3, color=color, label=label)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_ylim(-0.5, 1)
        axis.set_title(policy, loc="left", fontweight="bold")
        axis.set_xlabel("response tokens written")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.supylabel("share of the returns' variance", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
