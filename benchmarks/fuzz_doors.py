"""Strangers' files, mutated: headers, indexes, configs, tokenizers and GGUF through our own doors.

    python benchmarks/fuzz_doors.py [--seed N] [--share 0.01] [--out DIR]

Every case must load or be refused with a ``CheckpointError``, within a second of processor time,
and the whole run must not grow by more than 256 MB. A case is known by its door, the seed and its
number, so what fails can be had again. ``--share`` runs that part of the recorded numbers.
"""

import argparse
import base64
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fathom
from fathom.convert.checkpoint import read_folder_config
from fathom.convert.families import read_config
from fathom.convert.gguf import open_gguf
from fathom.convert.hf_tokenizer import GENERATION_CONFIG, read_hf_tokenizer
from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import INDEX, SINGLE, FolderSource
from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.generate.defaults import read_defaults

SECONDS, GROWN_BYTES = 1.0, 256 * 2**20
ODD: list[Any] = [None, True, 0, -1, 1, 2**31, 2**63, 1e308, -0.5, "", "a" * 300, "../x", "\x1b[2J"]
ODD += [[], {}, [[]], {"a": 1}, [0] * 50]
SPLICES = (b"", b"{", b"]", b'"', b"\\u0000", b"\xff", b"1e999", b"[" * 200, b'{"a":' * 100, b"NaN")


@dataclass(frozen=True)
class Door:
    """One way in.

    Args:
        whole: contents that are accepted.
        enter: takes a mutated one.
        json_from: where JSON begins, which is then also changed as JSON; None: bytes alone.
        header_end: finds where in a content its tensors begin, which are left alone.
        cases: how many make the recorded run.
    """

    whole: list[bytes]
    enter: Callable[[bytes], object]
    json_from: int | None
    cases: int
    header_end: Callable[[bytes], int] = len


def mutated(door: Door, draw: random.Random) -> bytes:
    """A whole content with one to four changes, of its bytes or of its JSON."""
    content = draw.choice(door.whole)
    for _ in range(draw.randint(1, 4)):
        if door.json_from is not None and draw.random() < 0.5:
            try:
                content = changed_json(content, door.json_from, draw)
                continue
            except (ValueError, RecursionError):
                pass  # no longer JSON, so bytes it is
        end = door.header_end(content)
        content = changed_bytes(content[:end], draw) + content[end:]
    return content


def safetensors_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def gguf_end(content: bytes) -> int:
    return content.rfind(b".weight") + 40


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """A byte, a splice, a repetition or a cut."""
    at = draw.randint(0, len(content))
    end = min(len(content), at + draw.choice((0, 1, 1, 8, 64)))
    kind = draw.randrange(4)
    if kind == 0:
        return content[:at] + bytes(draw.randrange(256) for _ in range(end - at)) + content[end:]
    if kind == 1:
        return content[:at] + draw.choice(SPLICES) + content[end:]
    if kind == 2:
        return content[:end] + content[at:end] * draw.choice((1, 3)) + content[end:]
    return content[:at] if draw.random() < 0.2 else content[:at] + content[end:]


def changed_json(content: bytes, begin: int, draw: random.Random) -> bytes:
    """One value made odd, exchanged, dropped or renamed; a header's length stays true."""
    length = int.from_bytes(content[:8], "little") if begin else len(content)
    data, rest = json.loads(content[begin : begin + length]), content[begin + length :]
    node = data
    while isinstance(node, dict | list) and node:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        place = draw.choice(places)
        if draw.random() < 0.4 or not isinstance(node[place], dict | list):
            kind = draw.randrange(4)
            if kind == 0:
                node[place] = draw.choice(ODD)
            elif kind == 1:
                node[place] = node[draw.choice(places)]
            elif kind == 2:
                del node[place]
            elif isinstance(node, dict):
                node[str(place) + draw.choice(("x", "", "\n"))] = draw.choice(ODD)
            break
        node = node[place]
    text = json.dumps(data).encode()
    return (len(text).to_bytes(8, "little") if begin else b"") + text + rest


def ranks(tokenizer: Tokenizer) -> list[bytes]:
    """All bytes, and what a vocabulary of ours joined, as tiktoken would order them."""
    joined = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    tokens = [*(bytes([i]) for i in range(256)), *(piece for piece in joined if len(piece) > 1)]
    return list(dict.fromkeys(tokens))


def sentencepiece_model() -> bytes:
    """A ``tokenizer.model`` of few pieces: the fields of ``sentencepiece_model.proto``, by hand."""

    def part(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def piece(name: str, score: float, kind: int) -> bytes:
        scored = bytes([2 << 3 | 5]) + struct.pack("<f", score)
        return part(1, part(1, name.encode()) + scored + bytes([3 << 3, kind]))

    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    words = ("Th", "The", "\u2581The", "\u2581", *"The12.")
    pieces += [(word, -rank, 1) for rank, word in enumerate(words)]
    bpe = bytes([3 << 3, 2, (35 << 3 & 127) | 128, 35 >> 4, 1])  # model_type, byte_fallback
    as_it_is = bytes([4 << 3, 0])  # remove_extra_whitespaces
    return b"".join(piece(*each) for each in pieces) + part(2, bpe) + part(3, as_it_is)


def doors(folder: Path) -> dict[str, Door]:
    """Every door, with whole files to begin from."""
    sample = "the quick brown fox jumps over the lazy dog, twice; and 12 more. " * 20
    tokenizer = train_tokenizer([sample], 300)
    models = []
    for name in ("tiny-llama", "tiny-deepseek"):
        model = fathom.build(name, "groups.*.count=1", vocab_size=tokenizer.vocab_size, dim=32)
        fathom.save(model, folder / name, tokenizer=tokenizer, format="hf")
        models.append(folder / name)
    fathom.save(
        fathom.build("tiny-gqa", "groups.0.count=1", vocab_size=tokenizer.vocab_size, dim=32),
        folder / "m.gguf",
        tokenizer=tokenizer,
        format="gguf",
    )
    weights = [(each / SINGLE).read_bytes() for each in models]
    names = list(FolderSource(models[0]).entries)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    place = folder / "case"
    place.mkdir()

    def enter_folder(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def enter(content: bytes) -> object:
            (place / name).write_bytes(content)
            return read(place)

        return enter

    def enter_index(content: bytes) -> object:
        inside = folder / "indexed"
        if not inside.exists():
            inside.mkdir()
            (inside / "a.safetensors").write_bytes(weights[0])
        (inside / INDEX).write_bytes(content)
        return FolderSource(inside)

    def enter_tokenizer(content: bytes) -> object:
        return read_hf_tokenizer({"tokenizer.json": content}, "it").encode("The fox, 12.")

    def enter_vocabulary(name: str, **config: Any) -> Callable[[bytes], object]:
        neighbour = {"tokenizer_config.json": json.dumps(config).encode()}
        return lambda content: read_hf_tokenizer({name: content, **neighbour}, "it").encode(
            "The 1."
        )

    tokens = ranks(tokenizer)
    ends = {str(len(tokens)): {"content": "[BOS]"}, str(len(tokens) + 1): {"content": "[EOS]"}}
    lines = b"\n".join(b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(tokens))
    moonshot = enter_vocabulary(
        "tiktoken.model", tokenizer_class="TikTokenTokenizer", added_tokens_decoder=ends
    )

    def read_as_config(inside: Path) -> object:
        return read_config(read_folder_config(inside), "config.json")

    configs = [(each / "config.json").read_bytes() for each in models]
    said = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": [1, 2]}
    return {
        "safetensors headers": Door(
            weights, enter_folder(SINGLE, FolderSource), 8, 200_000, safetensors_end
        ),
        "configs": Door(configs, enter_folder("config.json", read_as_config), 0, 20_000),
        "indexes": Door([json.dumps(index).encode()], enter_index, 0, 20_000),
        "generation configs": Door(
            [json.dumps(said).encode()],
            lambda content: read_defaults({GENERATION_CONFIG: content}, {}, "it"),
            0,
            20_000,
        ),
        "tokenizers": Door(
            [(models[0] / "tokenizer.json").read_bytes()], enter_tokenizer, 0, 20_000
        ),
        "tiktoken vocabularies": Door([lines], moonshot, None, 20_000),
        "SentencePiece vocabularies": Door(
            [sentencepiece_model()], enter_vocabulary("tokenizer.model"), None, 20_000
        ),
        "GGUF headers": Door(
            [(folder / "m.gguf").read_bytes()],
            enter_folder("m.gguf", lambda inside: open_gguf(inside / "m.gguf")),
            None,
            20_000,
            gguf_end,
        ),
    }


@dataclass
class Tally:
    """What became of a door's cases."""

    cases: int = 0
    loaded: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    grown_bytes: int = 0


class FuzzError(AssertionError):
    """A case that broke the promise."""


def fuzz(name: str, door: Door, cases: int, seed: int) -> Tally:
    """Run a door's cases.

    Raises:
        FuzzError: one crashed, or took too long; or all together took too much memory.
    """
    tally = Tally()
    door.enter(door.whole[0])  # what is imported on first use is not the stranger's doing
    before = peak_bytes()
    for number in range(cases):
        content = mutated(door, random.Random(f"{name} {seed} {number}"))
        start = time.process_time()
        try:
            door.enter(content)
            tally.loaded += 1
        except CheckpointError:
            tally.refused += 1
        except (Exception, RecursionError) as error:
            raise FuzzError(f"{name}, seed {seed}, case {number}: {error!r}") from error
        tally.slowest_s = max(tally.slowest_s, time.process_time() - start)
        tally.cases += 1
        tally.grown_bytes = peak_bytes() - before
        if tally.slowest_s > SECONDS or tally.grown_bytes > GROWN_BYTES:
            raise FuzzError(f"{name}, seed {seed}, case {number}: {tally}")
    return tally


def peak_bytes() -> int:
    """The most memory this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    import records

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0)
    args = parser.parse_known_args()[0]
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as made:
        found = {}
        for name, door in doors(Path(made)).items():
            found[name] = fuzz(name, door, max(1, int(door.cases * args.share)), args.seed)
            print(name, found[name], flush=True)
    rows = [
        records.row(name, "cases without crash or hang", "cases", tally.cases, {})
        for name, tally in found.items()
    ]
    more = {name: vars(tally) for name, tally in found.items()}
    records.write("fuzz_doors", rows, {}, seed=args.seed, share=args.share, doors=more)


if __name__ == "__main__":
    main()
