"""How much of the return could a value function explain on the pocket task, and how much does ours?

    python benchmarks/learning_value.py --output-dir runs/learning

From every state of some held-out responses the policy writes many continuations. The returns G of
one state's continuations differ by chance alone, which no value function can foresee; their means
differ from state to state by what it could:

    attainable = Var(E[G | state]) / Var(G)

(estimated without the bias of a finite number of continuations, as in a one-way analysis of
variance). Beside it, for the same states and returns, the share 1 - Var(G - V) / Var(G) that value
functions explain: the one that PPO left; the best linear function of the policy's hidden states;
and a critic with a backbone of its own that was trained on while the policy stood still. For the
untrained policy and for the trained one.
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

BETA = SETTINGS[0].config(1, 0).ppo.kl_coef
ROWS = 256  # continuations that are drawn at one time
MIN_STATES = 16  # at a position, for a variance of them
COLORS = "black", "#d55e00", "#0072b2", "#009e73"


@dataclass(frozen=True)
class Arguments:
    """What a value function could explain, and what ours does."""

    output_dir: Path = Path("runs/learning")
    """Folder that gets value.json and value.png."""
    iterations: int = 30
    """Iterations of PPO."""
    critic_iterations: int = 100
    """Iterations in which a critic is trained while the policy stands still."""
    critic_learning_rate: float = 1e-3
    """Its peak; PPO's own is too low for it to arrive in this time."""
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
    agent = bench.agent(SETTINGS[0].config(arguments.iterations, arguments.seed))

    def look(critics: dict[str, PolicyValueNetwork]) -> States:
        policy, reference = agent.network, agent.initial_backbone
        critics |= {
            "best linear head": with_best_head(policy, reference, bench, arguments.seed),
            "critic of its own, trained on": with_trained_critic(agent, arguments),
        }
        prompts = bench.held_out[: arguments.prompts]
        return states_of(policy, critics, bench.task, reference, prompts, arguments)

    before = look({})
    for _, metrics in agent.learn():
        say("PPO", agent, metrics)
    return {"untrained policy": before, "trained policy": look({"PPO's": agent.network})}


def say(what: str, agent: PPOAgent, metrics: dict[str, float]) -> None:
    if agent.iteration % 10 == 0:
        explained_variance = metrics["value/explained_variance"]
        print(f"{what}, iteration {agent.iteration}: {explained_variance:.2f}", flush=True)


def with_trained_critic(agent: PPOAgent, arguments: Arguments) -> PolicyValueNetwork:
    """The policy with a critic of its own, trained while the policy stands still."""
    config, count = agent.config, arguments.critic_iterations
    optimizer = replace(
        config.optimizer,
        critic_warmup_iterations=count,
        learning_rate=arguments.critic_learning_rate,
    )
    held = PPOAgent(
        agent.network,
        agent.task,
        replace(
            config,
            ppo=replace(config.ppo, critic="separate"),
            optimizer=optimizer,
            run=replace(config.run, num_iterations=count + 1, seed=config.run.seed + 1),
        ),
        count + 1,
    )
    held.initial_backbone = agent.initial_backbone  # the returns are penalised as they were
    for _, metrics in held.learn():
        say("critic", held, metrics)
        if held.iteration == count:
            break
    return held.network


def with_best_head(
    policy: PolicyValueNetwork, reference: nnx.State, bench: Bench, seed: int
) -> PolicyValueNetwork:
    """The policy with the value head that least squares gives, from four times the prompts."""
    key = jax.random.fold_in(jax.random.key(seed), 2_000_001)
    graphdef, params = nnx.split(policy)
    task, actor = bench.task, Actor(policy, bench.task, Sampling())
    backbone = jax.jit(lambda params, *x: nnx.merge(graphdef, params).backbone(*x)[0])
    features, returns = [], []
    for start in range(0, len(bench.prompts), 64):
        prompts = bench.prompts[start : start + 64]
        done = actor.respond(
            params, prompts, jax.random.fold_in(key, start), completions_per_prompt=4
        )
        state = done.rollout.state
        hidden = backbone(params, state.tokens, mdp.attention_mask(state, jnp))
        rows, columns = np.nonzero(written(state, task.rules.max_new_tokens))
        before = np.asarray(state.prompt_length)[rows] + columns - 1
        features.append(np.asarray(hidden)[rows, before])
        penalties = BETA * log_ratios(done, policy, reference, task)
        to_come = penalties[:, ::-1].cumsum(axis=1)[:, ::-1]
        returns.append((done.scores[:, None] - to_come)[rows, columns])
    x, y = np.concatenate(features), np.concatenate(returns)
    weight, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y)
    network = nnx.merge(graphdef, params)
    network.value_head.weight[...] = jnp.asarray(weight[None, :-1], jnp.float32)
    network.value_head.bias[...] = jnp.asarray(weight[-1:], jnp.float32)
    return network


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
    returns = []
    for start in range(0, len(prefixes), per_call):
        here = prefixes[start : start + per_call]
        done = actor.respond(
            params,
            here + here[-1:] * (per_call - len(here)),
            jax.random.fold_in(key, start),
            completions_per_prompt=arguments.continuations,
        )
        penalties = BETA * log_ratios(done, policy, reference, longer).sum(-1)
        returns.append((done.scores - penalties).reshape(per_call, -1)[: len(here)])
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


def log_ratios(
    done: Episodes, policy: PolicyValueNetwork, reference: nnx.State, task: TextTask
) -> np.ndarray:
    """log policy - log reference of every response token, float [N, T]."""
    params = nnx.State({**nnx.state(policy), "backbone": reference})
    under_reference = outputs(policy, params, done, task).logprobs
    mask = written(done.rollout.state, task.rules.max_new_tokens)
    return np.where(mask, done.rollout.logprobs - under_reference, 0.0)


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
