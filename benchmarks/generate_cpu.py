"""Decoding on the CPU: SmolLM2-135M, float32, batch 1, against transformers and against memory.

    fathom fetch smollm2-135m && python benchmarks/generate_cpu.py [--out DIR]

Every new token reads each weight once, so the rate at which this machine reads as many bytes is the
limit: plainly, and in products of matrix and vector as we compute them. A decoded token's time is
what 64 more tokens take, the least of the repeats; the two libraries are timed in turns, and must
write the same tokens. Run it on a machine that does nothing else.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import limits, row, spread, write

import fathom
from fathom.generate.layout import lay_out_for_decoding
from fathom.model import Decoder
from fathom.ops.linear import linear

NAME, PROMPT = "smollm2-135m-instruct", "The history of the city begins with"
NEW_TOKENS, REPEATS = 64, 5
Generate = Callable[[int], list[int]]


def ours(model: Decoder) -> Generate:
    """Greedy ids of so many new tokens, with no token ending the text."""
    engine = fathom.Engine(model, defaults={"eos_ids": ()})
    return lambda n: engine.generate([PROMPT], max_new_tokens=n)[0].tokens


def theirs(model: Decoder) -> Generate:
    """The same by transformers, from the folder that we write for it."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        fathom.save(model, folder, format="hf")
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    ids = torch.tensor([model.tokenizer.encode(PROMPT)])

    def generate(n: int) -> list[int]:
        found = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
        )
        return found[0, ids.shape[1] :].tolist()

    return generate


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def token_seconds(generate: Generate) -> float:
    """Time of one decoded token: what more of them take, so that the prompt does not count."""
    short = seconds(lambda: generate(1))
    return (seconds(lambda: generate(1 + NEW_TOKENS)) - short) / NEW_TOKENS


def limit_seconds(model: Decoder) -> dict[str, float]:
    """The quickest pass over as many bytes as the weights are: reading them, and multiplying."""
    size = sum(p.numel() for p in model.parameters())
    matrix = torch.ones(size // 4096, 4096)
    wide, tall = torch.ones(1, 4096), torch.ones(1, size // 4096)
    passes: dict[str, list[Callable[[], object]]] = {
        "reading-weights": [matrix.amax],
        "products": [lambda: linear(wide, matrix), lambda: linear(tall, matrix.t())],
    }
    return {
        name: min(seconds(run) for run in runs for _ in range(10)) for name, runs in passes.items()
    }


def main() -> None:
    model = fathom.load(NAME, dtype="float32")
    peers = theirs(model)
    lay_out_for_decoding(model)  # as fathom generate does
    mine = ours(model)
    assert mine(NEW_TOKENS) == peers(NEW_TOKENS), "the two do not write the same tokens"
    limit_s = limit_seconds(model)
    pairs = [(token_seconds(mine), token_seconds(peers)) for _ in range(REPEATS)]
    rates = [1 / one for one, _ in pairs]
    rate, other = max(rates), max(1 / two for _, two in pairs)
    case = f"SmolLM2-135M, float32, batch 1, {torch.get_num_threads()} threads"
    rows = [
        row(case, "decode", "tokens/s", rate, {"transformers": other}, spread=spread(rates)),
        *(
            row(f"{case}, limit of {name}", "decode", "tokens/s", rate, {name: 1 / each})
            for name, each in limit_s.items()
        ),
    ]
    write("generate_cpu", rows, limits(), prompt=PROMPT, new_tokens=NEW_TOKENS)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
