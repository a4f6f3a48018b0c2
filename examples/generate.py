"""Generate with a trained run, or with a preset's random weights: batched, cached, streamed.

python examples/generate.py [runs/example] [--prompt "It is" --prompt "def "] [--tokens 32]
"""

import argparse
from pathlib import Path

import torch

import fathom


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Generate with a trained run, or with a preset's random weights."
    )
    parser.add_argument("model", nargs="?", default="tiny-deepseek", help="a run folder or preset")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()

    trained = Path(args.model).exists()
    model = fathom.load(args.model) if trained else fathom.build(args.model, seed=0)
    engine = fathom.Engine(model)
    prompts = args.prompt or ["It is a truth", "def "]

    # Prompts of unequal length share one cache; each row draws from a generator of its own.
    results = engine.generate(
        prompts, max_new_tokens=args.tokens, temperature=0.8, top_p=0.95, seed=7
    )
    for prompt, result in zip(prompts, results, strict=True):
        print(
            f"{prompt!r} -> {result.text!r} ({len(result.tokens)} tokens, {result.finish_reason})"
        )

    # The same forward by hand: a prefill, then one token from the cache.
    tokens = torch.tensor([[1, 2, 3, 4]])
    cache = model.new_cache(batch_size=1, capacity=8)
    with torch.inference_mode():
        model(tokens[:, :3], cache=cache)
        last = model(tokens[:, 3:], cache=cache)[:, -1]
        whole = model(tokens)[:, -1]
    print(f"cached and whole logits differ by at most {(last - whole).abs().max():.1e}")


if __name__ == "__main__":
    main()
