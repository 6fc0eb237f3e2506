"""Time transformers' `generate` on the rollout of `benchmarks/ppo.py`, in TRL's environment.

.venv-trl/bin/python benchmarks/peers/transformers_generate.py --model runs/smollm2/final
"""

import argparse
import json
import resource
import time
from importlib.metadata import version
from statistics import median

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=24)
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=5, help="after the first")
    work = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(work.model).eval()
    seconds = []
    for _ in range(work.iterations + 1):
        ids = torch.randint(100, 40_000, (work.batch_size, work.prompt_length))
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=work.response_length,
                max_new_tokens=work.response_length,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - start)
        assert out.shape[1] == work.prompt_length + work.response_length
    print(
        json.dumps(
            {
                "work": vars(work),
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "seconds": {"rollout": median(seconds[1:])},
                "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
