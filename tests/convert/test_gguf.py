"""GGUF files: every kind of block, a Llama whose logits survive, its tokenizer, and refusals."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom import api
from fathom.attention import MHAConfig
from fathom.config import LayerGroup, ModelConfig
from fathom.convert.gguf import hf_name, is_gguf, open_gguf
from fathom.convert.gguf_file import GGUFFile
from fathom.convert.hf_tokenizer import read_hf_tokenizer
from fathom.convert.load import fill
from fathom.convert.run_folder import CheckpointError
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.ffn import DenseConfig
from fathom.generate import Engine
from fathom.layers.position import RopeConfig
from fathom.layers.rope import LinearScaling, Llama3Scaling, YarnScaling
from fathom.model import Decoder, build_model
from kinds import mha

TOKENIZER = Tokenizer.load(BUNDLED / "tokenizer-1k.json")
RNG = np.random.default_rng(0)
FIELDS = {
    "embedding_length": 24,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 6,
    "attention.value_length": 6,
    "rope.dimension_count": 6,
    "feed_forward_length": 40,
    "context_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 100.0,
    "vocab_size": 1024,
}


def model_of(*, tied: bool = False, position: RopeConfig | None = None) -> Decoder:
    attention = mha(position or RopeConfig(theta=100.0))
    group = LayerGroup(count=2, attention=attention, ffn=DenseConfig(inter_dim=40))
    cfg = ModelConfig(
        vocab_size=1024,
        dim=24,
        groups=(group,),
        max_seq_len=64,
        norm_eps=1e-5,
        tie_embeddings=tied,
        init_std=0.3,
    )
    return build_model(cfg, seed=3)


def adjacent(weight: Tensor) -> Tensor:
    """llama.cpp's order of query and key rows, from halves: written here a second time."""
    rows = []
    for head in weight.split(6):
        rows += [row for pair in zip(head[:3], head[3:], strict=True) for row in pair]
    return torch.stack(rows)


def gguf_tensors(model: Decoder) -> dict[str, Tensor]:
    names = {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output"}
    names |= {"attention_norm": "attn_norm", "w_gate": "ffn_gate", "w_up": "ffn_up"}
    names |= {"w_down": "ffn_down", "ffn_norm": "ffn_norm"}
    found = {}
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            weight = adjacent(weight) if parts[-2] in ("wq", "wk") else weight
            found[f"blk.{parts[1]}.{names[parts[-2]]}.weight"] = weight
        else:
            theirs = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
            found[f"{theirs[parts[0]]}.weight"] = weight
    return found


def write(
    path: Path,
    tensors: dict[str, Tensor],
    fields: dict | None = None,
    more: dict | None = None,
    kind: Q = Q.F32,
) -> Path:
    """A file by the library's own writer, so that ours is read against another's."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in {**FIELDS, **(fields or {})}.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](f"llama.{name}", value)
    for name, value in (more or {}).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            {int: writer.add_uint32, str: writer.add_string}[type(value)](name, value)
    for name, tensor in tensors.items():
        numbers, as_kind = tensor.float().numpy(), kind if tensor.dim() > 1 else Q.F32
        if as_kind == Q.F32:
            writer.add_tensor(name, numbers)
        else:
            writer.add_tensor(name, gguf.quantize(numbers, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- Blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
def test_a_tensor_is_read_as_the_library_reads_it(kind: Q, tmp_path: Path) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    file = GGUFFile(write(tmp_path / "m.gguf", {"w": weight, "n": weight[0]}, kind=kind))
    got = file.read("w")
    want = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
    assert got.shape == file.entries["w"].shape == (5, 64)
    assert got.dtype == file.entries["w"].dtype
    assert got.dtype == {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert np.array_equal(got.float().numpy(), want)
    error = {Q.F32: 0, Q.F16: 2e-3, Q.BF16: 2e-2, Q.Q8_0: 2e-2}.get(kind, 0.5)
    assert (got.float() - weight).abs().max() <= error
    assert torch.equal(file.read("n"), weight[0])
    assert file.entries["w"].num_bytes == len(gguf.quantize(weight.numpy(), kind).tobytes())


def q4_k(block: bytes) -> list[float]:
    """One block by the format's description: 8 parts of 32, a 6-bit scale and minimum each."""
    d, low = (np.frombuffer(block[i : i + 2], np.float16)[0].astype(float) for i in (0, 2))
    packed, nibbles, numbers = block[4:16], block[16:], []
    for part in range(8):
        if part < 4:
            scale, minimum = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
            minimum = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
        for byte in nibbles[part // 2 * 32 :][:32]:
            numbers.append(d * scale * (byte >> 4 * (part % 2) & 15) - low * minimum)
    return numbers


def q6_k(block: bytes) -> list[float]:
    """One block: 16 parts of 16; four low bits here, two high bits there."""
    low, high = block[:128], block[128:192]
    scales = np.frombuffer(block[192:208], np.int8)
    d = np.frombuffer(block[208:], np.float16)[0].astype(float)
    numbers = []
    for i in range(256):
        half, place = divmod(i, 128)
        quarter, j = divmod(place, 32)
        four = low[64 * half + 32 * (quarter % 2) + j] >> 4 * (quarter // 2) & 15
        two = high[32 * half + j] >> 2 * quarter & 3
        numbers.append(d * scales[i // 16] * ((four | two << 4) - 32))
    return numbers


@pytest.mark.parametrize(
    ("kind", "definition", "halves"),
    [(Q.Q4_K, q4_k, (0, 2)), (Q.Q6_K, q6_k, (208,))],
    ids=["Q4_K", "Q6_K"],
)
def test_blocks_of_256_are_read_as_described(kind, definition, halves, tmp_path: Path) -> None:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = RNG.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    for at in halves:  # scales that are numbers
        for block in (0, size):
            raw[:, block + at : block + at + 2] = np.array([0.25], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    for step in ("header", "kv_data"):
        getattr(writer, f"write_{step}_to_file")()
    writer.write_tensors_to_file()
    writer.close()
    got = GGUFFile(tmp_path / "m.gguf").read("w")
    want = [[x for b in (0, size) for x in definition(row[b : b + size].tobytes())] for row in raw]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-6, atol=1e-6)


# --- A Llama -----------------------------------------------------------------------------------


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None] * 37 % 1024)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_gives_the_logits_it_was_written_with(tied: bool, tmp_path: Path) -> None:
    model = model_of(tied=tied)
    path = write(tmp_path / "m.gguf", gguf_tensors(model))
    checkpoint = open_gguf(path)
    assert checkpoint.cfg.norm_eps == 1e-5
    loaded = fill(checkpoint)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    wrong = fill(open_gguf(path, interleaved=False))
    assert (logits(wrong) - logits(model)).abs().max() > 0.1


def test_the_file_is_a_model_wherever_a_folder_is(tmp_path: Path) -> None:
    model = model_of()
    path = write(tmp_path / "m.gguf", gguf_tensors(model), more=token_fields())
    loaded = api.load(path)
    assert loaded.tokenizer.encode("Emma") == TOKENIZER.encode("Emma")  # pyright: ignore
    assert api.resolve(path) == loaded.cfg
    api.save(loaded, tmp_path / "hf", format="hf")
    again = api.load(tmp_path / "hf")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    (text,) = Engine(loaded).generate(["Emma"], max_new_tokens=4)
    assert Engine(again).generate(["Emma"], max_new_tokens=4) == [text]


def test_half_precision_stays_and_a_dtype_may_be_asked_for(tmp_path: Path) -> None:
    checkpoint = open_gguf(write(tmp_path / "m.gguf", gguf_tensors(model_of()), kind=Q.F16))
    assert fill(checkpoint).embed.weight.dtype == torch.float16
    assert fill(checkpoint, dtype=torch.float32).embed.weight.dtype == torch.float32


def test_fields_that_say_the_usual_may_be_absent(tmp_path: Path) -> None:
    absent = dict.fromkeys(("attention.key_length", "attention.value_length", "vocab_size"))
    path = write(tmp_path / "m.gguf", gguf_tensors(model_of()), absent)
    assert (
        open_gguf(path).cfg == open_gguf(write(tmp_path / "n.gguf", gguf_tensors(model_of()))).cfg
    )


def test_the_scaling_of_llama_3_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    scaling = Llama3Scaling(factor=8.0, original_seq_len=8192)
    model = model_of(position=RopeConfig(theta=1e6, scaling=scaling))
    plain = 1e6 ** -(torch.arange(0, 6, 2) / 6)
    divisors = plain / scaling.scale(plain, 1e6, 0)
    assert divisors.max() > 7
    tensors = {**gguf_tensors(model), "rope_freqs.weight": divisors}
    path = write(tmp_path / "m.gguf", tensors, {"rope.freq_base": 1e6})
    checkpoint = open_gguf(path)
    attention = checkpoint.cfg.groups[0].attention
    assert attention == model.cfg.groups[0].attention
    torch.testing.assert_close(logits(fill(checkpoint)), logits(model))
    tensors["rope_freqs.weight"] = divisors.flip(0)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not that of Llama 3"):
        open_gguf(write(tmp_path / "n.gguf", tensors, {"rope.freq_base": 1e6}))


def scaling_of(path: Path) -> object:
    attention = open_gguf(path).cfg.groups[0].attention
    assert isinstance(attention, MHAConfig)
    assert isinstance(attention.position, RopeConfig)
    return attention.position.scaling


def test_scalings_are_read(tmp_path: Path) -> None:
    said = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = write(tmp_path / "m.gguf", gguf_tensors(model_of()), said)
    assert scaling_of(path) == LinearScaling(factor=4.0)
    said |= {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16}
    path = write(tmp_path / "n.gguf", gguf_tensors(model_of()), said)
    assert scaling_of(path) == YarnScaling(factor=4.0, original_seq_len=16)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"block_count": 3}, "lacks the tensor 'model.layers.2"),
        ({"block_count": 1}, "holds the tensor 'model.layers.1"),
        ({"block_count": 2000}, "num_hidden_layers is 2000"),
        ({"embedding_length": 32}, "does not fit"),
        ({"embedding_length": None}, "does not say its widths"),
        ({"attention.head_count": 0}, "does not say its widths"),
        ({"attention.head_count": "many"}, "does not say its widths"),
        ({"feed_forward_length": None}, "intermediate_size is None"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4, and only the width"),
        ({"expert_count": 8}, "llama.expert_count is not followed"),
        ({"rope.scaling.type": "longrope"}, "rope_type is longrope"),
    ],
)
def test_fields_that_cannot_be_followed_are_refused_by_name(fields, sentence, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", gguf_tensors(model_of()), fields)
    with pytest.raises(CheckpointError, match=sentence):
        fill(open_gguf(path))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'qwen3'"):
        open_gguf(tmp_path / "m.gguf")


def test_names_are_those_of_hugging_face() -> None:
    assert hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    assert hf_name("rope_freqs.weight") is None
    assert hf_name("blk.0.new.weight") == "model.layers.0.new.weight"
    assert is_gguf(Path("a/b.gguf"))
    assert not is_gguf(Path("a/b"))


# --- Its tokenizer -----------------------------------------------------------------------------


def token_fields(**changes: object) -> dict:
    names = [TOKENIZER.token_name(i) for i in range(TOKENIZER.vocab_size)]
    merges = json.loads(TOKENIZER.to_bytes())["model"]["merges"]
    kinds = [3 if i < 2 or i >= TOKENIZER.text_vocab_size else 1 for i in range(len(names))]
    said = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": names,
        "merges": [" ".join(merge) for merge in merges],
        "token_type": kinds,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    return {
        f"tokenizer.ggml.{name}": value
        for name, value in {**said, **changes}.items()
        if value is not None
    }


def origin(tmp_path: Path, **changes: object):
    more = {**token_fields(**changes), "tokenizer.chat_template": "T"}
    return open_gguf(write(tmp_path / "m.gguf", gguf_tensors(model_of()), more=more)).origin


def test_the_tokenizer_gives_the_ids_it_was_written_with(tmp_path: Path) -> None:
    files = origin(tmp_path).files
    tokenizer = read_hf_tokenizer(files, "m")
    for text in ("In 1815 she said: 'No!'\n\n  x_1 = 23", "漢字 🙂 naïve", "<|eos|>", ""):
        assert tokenizer.encode(text) == TOKENIZER.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (0, 1, [])
    assert files["chat_template.jinja"] == b"T"


def test_what_the_fields_say_of_its_ends_is_kept(tmp_path: Path) -> None:
    files = origin(tmp_path, add_bos_token=True, eot_token_id=5).files
    assert read_hf_tokenizer(files, "m").begin_ids == [0]
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 5]}


def test_llama_3_cuts_numbers_by_three(tmp_path: Path) -> None:
    tokenizer = read_hf_tokenizer(origin(tmp_path, pre="llama-bpe", add_bos_token=None).files, "m")
    assert tokenizer.begin_ids == [0]
    assert tokenizer.decode(tokenizer.encode("12345 it's\n\n ok")) == "12345 it's\n\n ok"


@pytest.mark.parametrize("changes", [{"model": "t5"}, {"pre": "unheard-of"}, {"pre": None}])
def test_a_vocabulary_of_another_kind_is_left_out(changes, tmp_path: Path) -> None:
    assert set(origin(tmp_path, **changes).files) == {"chat_template.jinja"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens is no list of texts"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "its tokens are damaged"),
        ({"token_type": [1]}, "its tokens are damaged"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges is no list of texts"),
        ({"model": "llama"}, "not every token has a score and kind"),
    ],
)
def test_tokens_that_contradict_each_other_are_refused(changes, sentence, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        origin(tmp_path, **changes)


# --- Strangers' files --------------------------------------------------------------------------


def header(n_tensors: int = 0, n_fields: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + rest


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def info(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**63


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "too short"),
        (b"GGUF", "too short"),
        (b"NOPE" + bytes(40), "no GGUF file of version 2 or 3"),
        (header(version=1), "no GGUF file of version"),
        (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(40), "no GGUF file of version"),
        (header(n_tensors=HUGE), "claims 9,223,372,036,854,775,808 tensors"),
        (header(n_fields=HUGE), "claims 0 tensors and 9,223"),
        (header(n_fields=1), "cut short"),
        (header(n_fields=1, rest=text(b"", HUGE)), "bytes long"),
        (header(n_fields=1, rest=text(b"a") + struct.pack("<I", 77)), "is of type 77"),
        (header(n_fields=1, rest=text(b"a") + struct.pack("<IQ", 8, HUGE)), "bytes long"),
        (header(n_fields=1, rest=text(b"a") + struct.pack("<IQ", 8, 999)), "cut short"),
        (header(n_fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, HUGE)), "items"),
        (header(n_fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 2**20)), "cut short"),
        (header(n_fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "is of type 9"),
        (header(n_fields=2, rest=2 * (text(b"a") + struct.pack("<IB", 0, 1))), "names 'a' twice"),
        (
            header(n_fields=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 7)),
            "general.alignment is 7",
        ),
        (header(1, rest=info(b"w", [])), "has 0 dimensions"),
        (header(1, rest=info(b"w", [1] * 5)), "has 5 dimensions"),
        (header(1, rest=info(b"w", [4], kind=99)), "of GGUF type 99, which is not one of F32"),
        (header(1, rest=info(b"w", [2**39, 2**39])), "at the tensor 'w'"),
        (header(1, rest=info(b"w", [0])), "at the tensor 'w'"),
        (header(1, rest=info(b"w", [33], kind=8) + bytes(99)), "Q8_0 of \\[33\\]"),
        (header(1, rest=info(b"w", [4], offset=HUGE) + bytes(99)), "at the tensor 'w'"),
        (header(2, rest=2 * info(b"w", [1]) + bytes(99)), "at the tensor 'w'"),
        (header(2, rest=info(b"v", [4]) + info(b"w", [4]) + bytes(99)), "lies on another"),
    ],
    ids=range(26),
)
def test_a_damaged_header_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        GGUFFile(tmp_path / "m.gguf")


def test_a_link_or_pipe_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a link"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = token_fields(tokens=["a", "b"], token_type=[3, 3], merges=["a b"])
    return write(tmp_path_factory.mktemp("g") / "m.gguf", gguf_tensors(model_of()), more=more)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_sentence_or_harmless(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    end = content.index(b"output_norm.weight") + 64  # the header alone
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    damaged = whole.with_name("damaged.gguf")
    damaged.write_bytes(content[:cut])
    try:
        fill(open_gguf(damaged))
    except CheckpointError:
        return
