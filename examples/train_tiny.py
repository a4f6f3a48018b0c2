"""Train a tiny DeepSeek from Python, and let it write.

    python examples/train_tiny.py --out runs/example [--steps 40]

The same as `fathom train configs/tiny.toml --out runs/example`; run it again with more steps and it
goes on from its newest checkpoint.
"""

import argparse
from pathlib import Path

import fathom
from fathom.train.config import read_run_config
from fathom.train.loop import train
from fathom.train.progress import reporter

CONFIG = {
    "model": {"preset": "tiny-deepseek"},
    "data": {"source": "bundled", "seq_len": 128},
    "train": {
        "steps": 40,
        "tokens_per_step": 1024,
        "lr": 3e-3,
        "warmup_steps": 1,
        "schedule": "constant",  # so that a longer run begins as a shorter one
        "eval_bytes": 8192,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny DeepSeek, and let it write.")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    cfg = read_run_config(CONFIG, [f"train.steps={args.steps}"])
    result = train(cfg, args.out, reporter=reporter(cfg.train.log_every))
    print(result.message)
    if result.evaluation is not None:
        print(f"held-out bits per byte: {result.evaluation.mean:.3f}")

    model = fathom.load(args.out)
    (written,) = fathom.Engine(model).generate(["The "], max_new_tokens=32, temperature=0.8, seed=1)
    print("The " + written.text)


if __name__ == "__main__":
    main()
