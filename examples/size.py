"""What a model costs, from its config alone: no weights, no GPU, no download.

python examples/size.py [llama-3-8b deepseek-v2-lite ...] [--seq-len 32768]
"""

import argparse
from dataclasses import replace

import fathom
from fathom.attention import MHAConfig

DEFAULT = ["llama-2-7b", "llama-3-8b", "deepseek-v2-lite", "deepseek-v3"]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a model costs, from its config alone.")
    parser.add_argument("models", nargs="*", default=DEFAULT, help="presets, configs, run folders")
    parser.add_argument("--seq-len", type=int, default=32768)
    args = parser.parse_args()

    print(f"{'model':20} {'parameters':>16} {'active':>15} {'cache, GB':>10} {'GFLOPs/token':>13}")
    for name in args.models:
        found = fathom.size(name, seq_len=args.seq_len)
        print(
            f"{name:20} {found['params']:16,} {found['active_params']:15,} "
            f"{found['cache_bytes'] / 1e9:10.2f} {found['flops_per_token'] / 1e9:13.1f}"
        )

    # Any change is a config: Llama 3 8B with one key-value head per query head.
    cfg = fathom.preset("llama-3-8b")
    (group,) = cfg.groups
    assert isinstance(group.attention, MHAConfig)
    attention = replace(group.attention, n_kv_heads=group.attention.n_heads)
    mha = replace(cfg, groups=(replace(group, attention=attention),))
    ratio = fathom.size(mha)["cache_bytes_per_token"] / fathom.size(cfg)["cache_bytes_per_token"]
    print(f"llama-3-8b without shared key-value heads would cache {ratio:.0f} times as much")


if __name__ == "__main__":
    main()
