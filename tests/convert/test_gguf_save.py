"""GGUF out: what is written is read back, the same model under llama.cpp's names."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from fathom import api
from fathom.attention import MHAConfig
from fathom.cli import main
from fathom.convert.gguf import open_gguf
from fathom.convert.gguf_file import GGUFFile
from fathom.convert.gguf_save import write_gguf
from fathom.convert.save import of_model
from fathom.layers.position import RopeConfig
from fathom.layers.rope import LinearScaling, Llama3Scaling, YarnScaling
from fathom.model import Decoder, build_model
from fathom.presets import preset

SCALINGS = {
    "none": None,
    "linear": LinearScaling(factor=2.0),
    "yarn": YarnScaling(factor=4.0, original_seq_len=64),
    "llama3": Llama3Scaling(factor=8.0, original_seq_len=8192),
}


def model_of(scaling: str = "none", *, tied: bool = False, name: str = "tiny-gqa") -> Decoder:
    cfg = replace(preset(name), tie_embeddings=tied, init_std=0.1)
    if scaling != "none":
        group = cfg.groups[0]
        assert isinstance(group.attention, MHAConfig)
        position = RopeConfig(theta=500000.0, scaling=SCALINGS[scaling])
        attention = replace(group.attention, position=position)
        cfg = replace(cfg, groups=(replace(group, attention=attention),))
    return build_model(cfg, seed=5)


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None] * 41 % 1024).float()


def written(model: Decoder, path: Path, **options) -> Path:
    api_tokenizer = api.tokenizer_of(model)
    write_gguf(of_model(model, api_tokenizer), path, **options)
    return path


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_llama_comes_back_whatever_its_rope(scaling: str, tmp_path: Path) -> None:
    model = model_of(scaling, tied=scaling == "linear")
    half = model_of(scaling, tied=scaling == "linear").half().float()  # what F16 can hold
    path = written(model, tmp_path / "m.gguf")
    loaded = api.load(path, dtype="float32")
    assert loaded.cfg.groups == model.cfg.groups
    torch.testing.assert_close(logits(loaded), logits(half), rtol=2e-3, atol=2e-3)
    assert list(tmp_path.iterdir()) == [path]


def test_its_words_come_back_too(tmp_path: Path) -> None:
    model = model_of()
    loaded = api.load(written(model, tmp_path / "m.gguf"))
    own, theirs = api.tokenizer_of(model), loaded.tokenizer
    for text in ("It was 1815, and «naïve» 漢字 🙂\n\n", "<|eos|>"):
        assert theirs.encode(text) == own.encode(text)  # pyright: ignore
    assert theirs.begin_ids == [own.bos_id]  # pyright: ignore


def test_eight_bits_are_close_and_vectors_stay_whole(tmp_path: Path) -> None:
    model = model_of()
    file = GGUFFile(written(model, tmp_path / "m.gguf", kind="Q8_0"))
    forms = {name: file._spans[name].form.name for name in file.entries}
    assert forms["blk.0.ffn_down.weight"] == forms["token_embd.weight"] == "Q8_0"
    assert forms["blk.0.attn_norm.weight"] == forms["output_norm.weight"] == "F32"
    loaded = api.load(tmp_path / "m.gguf", dtype="float32")
    for name, weight in model.state_dict().items():
        error = (loaded.state_dict()[name] - weight).abs().max()
        assert error <= weight.abs().max() / 200


def test_another_reader_finds_the_names_of_llama_cpp(tmp_path: Path) -> None:
    reader = GGUFReader(str(written(model_of(), tmp_path / "m.gguf")))
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output.weight", "blk.1.attn_k.weight"} <= names
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 1
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert len(fields["tokenizer.ggml.tokens"]) == 1024


def test_convert_writes_and_verifies_a_file(tmp_path: Path, capsys) -> None:
    api.save(model_of(), tmp_path / "ours")
    out = str(tmp_path / "m.gguf")
    ask = ["convert", str(tmp_path / "ours"), out, "--format", "gguf"]
    assert main([*ask, "--verify"]) == 0
    assert "logits differ by at most 0.0" in capsys.readouterr().out
    assert main(ask) == 3
    assert main([*ask, "--force", "--dtype", "fp8"]) == 2
    assert "must be fp16 or q8_0" in capsys.readouterr().err
    assert main(["generate", out, "--max-new-tokens", "2"]) == 0


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = written(model_of(), tmp_path / "m.gguf")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        written(model_of(), path)
    assert path.read_bytes() == before
    assert written(model_of(), path, kind="Q8_0", force=True).read_bytes() != before
    assert open_gguf(path).cfg.vocab_size == 1024


@pytest.mark.parametrize(
    ("name", "file", "options", "sentence"),
    [
        ("tiny-gqa", "m.bin", {}, r"must be called \*\.gguf"),
        ("tiny-gqa", "m.gguf", {"kind": "Q4_K"}, "kind must be one of F16, Q8_0"),
    ],
)
def test_what_cannot_be_written_is_refused(name, file, options, sentence, tmp_path) -> None:
    with pytest.raises(ValueError, match=sentence):
        written(model_of(name=name), tmp_path / file, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same_model_from_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of()
    written(model, tmp_path / "m.gguf")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    tokens = torch.arange(20)[None] * 41 % 1024
    with torch.no_grad():
        theirs = peer(tokens).logits
    torch.testing.assert_close(theirs, logits(model.half().float()), rtol=2e-3, atol=2e-3)
