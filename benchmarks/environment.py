"""How fast the environment is stepped, with no model: `python benchmarks/environment.py`.

Prints, for this run on this machine: the time of a step of `gymnasium.make("QwenText-v0")` and its
ratio to `CartPole-v1` made the same way; token steps a second of `gymnasium.make_vec` with 256
rows; and how long importing and making take.
"""

import subprocess
import sys
import time

import gymnasium
import numpy as np

import qwen_env  # noqa: F401

TURNS = 7
SINGLE_STEPS = 20_000
VECTOR_STEPS = 400
NUM_ENVS = 256


def seconds_per_step(env_id: str) -> float:
    """Random actions, resets included."""
    env = gymnasium.make(env_id)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, env.action_space.n, SINGLE_STEPS).tolist()
    start = time.process_time()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return (time.process_time() - start) / SINGLE_STEPS


def vector_steps_per_second() -> float:
    """Random actions, decoding, rewards and resets included; steps that only reset do not count."""
    env = gymnasium.make_vec("QwenText-v0", num_envs=NUM_ENVS)
    env.reset(seed=0)
    shape = (VECTOR_STEPS, NUM_ENVS)
    actions = np.random.default_rng(0).integers(0, env.single_action_space.n, shape)
    num_resets = 0
    start = time.process_time()
    for row in actions:
        _, _, terminated, truncated, _ = env.step(row)
        num_resets += np.count_nonzero(terminated | truncated)
    return (VECTOR_STEPS * NUM_ENVS - num_resets) / (time.process_time() - start)


def seconds_of(code: str) -> float:
    """What `code` prints, run in a fresh interpreter."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    # They take turns, and the best turn counts: what else the machine does only slows down.
    turns = [
        (
            seconds_per_step("QwenText-v0"),
            seconds_per_step("CartPole-v1"),
            vector_steps_per_second(),
        )
        for _ in range(TURNS)
    ]
    ours, cartpole, vector = zip(*turns, strict=True)
    print(f"QwenText-v0 step         {min(ours) * 1e6:8.2f} us")
    print(f"CartPole-v1 step         {min(cartpole) * 1e6:8.2f} us")
    print(f"ratio                    {min(ours) / min(cartpole):8.2f}")
    print(f"make_vec, {NUM_ENVS} rows       {max(vector) / 1e6:8.2f} M token steps/s")

    clock = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    imported = seconds_of(clock.format("import qwen_env"))
    made = seconds_of(
        "import gymnasium, qwen_env;" + clock.format("gymnasium.make('QwenText-v0').reset()")
    )
    print(f"import qwen_env          {imported:8.2f} s")
    print(f"make and first reset     {made:8.2f} s")


if __name__ == "__main__":
    main()
