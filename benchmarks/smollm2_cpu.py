"""A real Llama, fetched from PyPI, read from GGUF: does it speak as it should?

Bits per byte of one excerpt of prose, with query and key rows in our order and, to show what a
converter that forgets it would cost, as the file has them; what a prompt and a question get.

    fathom fetch smollm2-135m && python benchmarks/smollm2_cpu.py
"""

import json
import math
from datetime import date

import records
import torch

from fathom.convert.fetch import SMOLLM2, located
from fathom.convert.gguf import open_gguf
from fathom.convert.load import fill, load_foreign
from fathom.data.corpus import read_bundled
from fathom.generate import Engine
from fathom.generate.chat import Chat, template_of

NAME = "smollm2-135m-instruct"
CHAPTER = "austen/pride-and-prejudice/17"
EXCERPT_BYTES = 1500
PROMPT, QUESTION = "The capital of France is", "What is the capital of France?"


def excerpt() -> str:
    """The opening of one chapter of the bundled prose, up to a full word."""
    text = next(d.text for d in read_bundled("prose") if d.id == CHAPTER)
    text = text.encode()[:EXCERPT_BYTES].decode(errors="ignore")
    return text.rsplit(" ", 1)[0]


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, tokenizer, text: str) -> tuple[float, int]:
    """Of all but the first token, which nothing stands before; and the number of tokens."""
    ids = tokenizer.encode(text)
    logprobs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    nats = -logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()
    return nats / math.log(2) / len(tokenizer.decode_bytes(ids[1:])), len(ids)


def main() -> None:
    path, text = located(NAME), excerpt()
    model = load_foreign(path)
    tokenizer = model.tokenizer
    right, tokens = bits_per_byte(model, tokenizer, text)
    unturned = fill(open_gguf(path, interleaved=False))
    wrong, _ = bits_per_byte(unturned, tokenizer, text)
    (continued,) = Engine(model).generate([PROMPT], max_new_tokens=8)
    chat = Chat(Engine(model), template_of(model))
    chat.answer(QUESTION, lambda _: None)
    answer = chat.messages[-1]["content"]
    case = f"{CHAPTER}, {len(text.encode())} bytes, {tokens} tokens"
    rows = [
        records.row(case, "bits_per_byte", "bits", right, {}, higher_is_better=False),
        records.row(
            f"{case}, rows as stored", "bits_per_byte", "bits", wrong, {}, higher_is_better=False
        ),
    ]
    record = {
        "benchmark": "smollm2_cpu",
        "command": "fathom fetch smollm2-135m && python benchmarks/smollm2_cpu.py",
        "device": records.device_name(),
        "versions": {"torch": torch.__version__},
        "date": date.today().isoformat(),
        "limits": {},
        "package": SMOLLM2.package._asdict(),
        "rows": rows,
        "prompt": {PROMPT: continued.text},
        "chat": {QUESTION: answer},
    }
    out = records.RESULTS / "smollm2_cpu.json"
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({**record["prompt"], **record["chat"]}, indent=1), right, wrong, out)


if __name__ == "__main__":
    main()
