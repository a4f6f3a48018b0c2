"""The public face: light to import, and whole: build, load, save, size, your own parts."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import fathom
from fathom.attention import ATTENTION, Attention, AttentionConfig, MHAConfig
from fathom.convert.run_folder import CheckpointError
from fathom.ffn import FFN, FFNS, FFNConfig
from fathom.layers.cache import Stream
from fathom.layers.step import Step
from fathom.settings import ConfigError, parse, refresh, to_data, to_toml


def test_importing_fathom_brings_no_torch() -> None:
    code = (
        "import sys, fathom; assert 'torch' not in sys.modules; dir(fathom); fathom.__version__;"
        "assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_resolves() -> None:
    for name in fathom.__all__:
        assert getattr(fathom, name) is not None
    assert set(fathom.__all__) <= set(dir(fathom))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fathom' has no attribute 'biuld'"):
        _ = fathom.biuld  # pyright: ignore


def test_build_takes_a_preset_with_changes() -> None:
    model = fathom.build("tiny-mla", "groups.0.attention.kv_lora_rank=24", vocab_size=300)
    assert model.cfg.vocab_size == 300
    assert to_data(model.cfg)["groups"][0]["attention"]["kv_lora_rank"] == 24
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 300)


def test_build_takes_a_config_and_config_classes() -> None:
    cfg = fathom.preset("tiny-llama")
    (group,) = cfg.groups
    model = fathom.build(cfg, groups=(replace(group, count=1),), mtp=fathom.MTPConfig())
    assert model.cfg == replace(cfg, groups=(replace(group, count=1),), mtp=fathom.MTPConfig())


def test_build_is_decided_by_the_seed() -> None:
    first, same, other = (fathom.build("tiny-gqa", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embed.weight, same.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_build_makes_weights_in_the_asked_dtype() -> None:
    model = fathom.build("tiny-gqa", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_build_reads_a_toml_of_a_model_or_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[model]\npreset = "tiny-gqa"\nnorm_eps = 1e-6\n[train]\nsteps = 1\n'
    )
    run = fathom.build(tmp_path / "run.toml").cfg
    assert run == replace(fathom.preset("tiny-gqa"), norm_eps=1e-6)
    (tmp_path / "model.toml").write_text(to_toml(run))
    assert fathom.size(str(tmp_path / "model.toml")) == fathom.size(run)


@pytest.mark.parametrize(
    ("model", "changes", "sentence"),
    [
        ("tiny-lama", {}, "did you mean 'tiny-llama'"),
        ("tiny-llama", {"vocab_szie": 3}, "unknown key vocab_szie: did you mean vocab_size"),
        ("tiny-llama", {"dim": "wide"}, "dim cannot be 'wide'"),
        ("tiny-llama", {"dim": 0}, "dim must be at least 1, got 0"),
        ("./not/there", {}, "there is no not/there"),
        ("there.toml", {}, "there is no there.toml"),
    ],
)
def test_build_refuses_what_cannot_be(model, changes, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fathom.build(model, **changes)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, .*, got 'int4'"):  # noqa: RUF043
        fathom.build("tiny-llama", dtype="int4")


def test_a_saved_model_loads_as_it_was_with_its_tokenizer(tmp_path: Path) -> None:
    model = fathom.build("tiny-deepseek", seed=5)
    fathom.save(model, tmp_path / "out")
    again = fathom.load(tmp_path / "out")
    assert again.cfg == model.cfg
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ask = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    assert fathom.Engine(again).generate(["So"], **ask) == fathom.Engine(model).generate(
        ["So"], **ask
    )
    narrow = fathom.load(tmp_path / "out", dtype="bfloat16")
    assert narrow.embed.weight.dtype == torch.bfloat16


def test_saving_never_overwrites_and_names_what_is_missing(tmp_path: Path) -> None:
    model = fathom.build("tiny-llama")
    with pytest.raises(ValueError, match="is there already"):
        fathom.save(model, tmp_path)
    with pytest.raises(ValueError, match="format must be one of fathom, hf, gguf, got 'onnx'"):
        fathom.save(model, tmp_path / "new", format="onnx")  # pyright: ignore
    with pytest.raises(ValueError, match="dtype goes with format='hf'"):
        fathom.save(model, tmp_path / "new", dtype="bfloat16")
    with pytest.raises(ValueError, match="no tokenizer of 77 ids"):
        fathom.save(fathom.build("tiny-llama", vocab_size=77), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_not_ours_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type is None, but must be one of llama"):
        fathom.load(tmp_path)
    (tmp_path / "old.pt").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        fathom.load(tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        fathom.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a preset, which has no weights"):
        fathom.load("deepseek-v2-lite")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="nor a checkpoint: no config"):
        fathom.size(tmp_path / "empty")


def test_size_reads_a_saved_models_config(tmp_path: Path) -> None:
    fathom.save(fathom.build("tiny-gqa"), tmp_path / "out")
    assert fathom.size(tmp_path / "out", seq_len=9) == fathom.size("tiny-gqa", seq_len=9)


class MeanAttention(Attention):
    """Every token gets the mean of all up to it: the least that is causal and can be cached."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        keys_BS, (x_BSD,) = step.append(x_BTD)
        mask = step.mask(keys_BS)
        n_new, n_all = x_BTD.shape[1], x_BSD.shape[1]
        causal = torch.ones(n_new, n_all).tril(n_all - n_new)
        seen_BTS = causal if mask is None else mask[:, 0]
        seen_BTS = seen_BTS.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)
        return self.wo(seen_BTS @ x_BSD / seen_BTS.sum(-1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class MeanConfig(AttentionConfig):
    kind: Literal["mean-for-test"] = "mean-for-test"
    width: int

    def build(self, dim: int) -> MeanAttention:
        return MeanAttention(dim)

    def streams(self) -> list[Stream]:
        return [Stream("x", self.width)]

    def num_params(self, dim: int) -> int:
        return dim * dim

    def projection_flops(self, dim: int) -> int:
        return 2 * dim * dim

    def core_flops(self, seq_len: int) -> int:
        return 2 * seq_len * self.width


@dataclass(frozen=True, kw_only=True)
class ZeroFFNConfig(FFNConfig):
    kind: Literal["zero-for-test"] = "zero-for-test"

    def build(self, dim: int) -> "ZeroFFN":
        return ZeroFFN()

    def num_params(self, dim: int) -> int:
        return 0

    def num_active_params(self, dim: int) -> int:
        return 0

    def flops_per_token(self, dim: int) -> int:
        return 0


class ZeroFFN(FFN):
    def forward(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, None]:
        return torch.zeros_like(x_BTD), None


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for table in (ATTENTION, FFNS):
        for name in ("mean-for-test", "zero-for-test"):
            monkeypatch.setitem(table, name, None)  # so that it is gone again afterwards
            del table[name]
    fathom.register_attention("mean-for-test", MeanConfig)
    fathom.register_ffn("zero-for-test", ZeroFFNConfig)
    yield
    monkeypatch.undo()
    refresh()


@pytest.mark.usefixtures("registered")
def test_ones_own_parts_are_configured_counted_built_and_decoded() -> None:
    model = fathom.build(
        "tiny-llama",
        groups=[
            {
                "count": 2,
                "attention": {"kind": "mean-for-test", "width": 128},
                "ffn": {"kind": "zero-for-test"},
            }
        ],
    )
    assert parse(fathom.ModelConfig, to_data(model.cfg)) == model.cfg
    size = fathom.size(model.cfg, seq_len=8)
    assert size["params"] == sum(p.numel() for p in model.parameters())
    assert size["rope"] is None
    (got,) = fathom.Engine(model).generate([[5, 9, 2]], max_new_tokens=4, symbols=True)
    ids = torch.tensor([[5, 9, 2, *got.tokens]])
    assert model(ids)[0, 2:-1].argmax(-1).tolist() == got.tokens


@pytest.mark.usefixtures("registered")
def test_registering_twice_is_fine_and_another_class_is_not() -> None:
    fathom.register_attention("mean-for-test", MeanConfig)
    with pytest.raises(ValueError, match="attention 'mha' is already MHAConfig"):
        fathom.register_attention("mha", replace_kind())
    with pytest.raises(ValueError, match='needs the field  kind: Literal\\["other"\\]'):
        fathom.register_attention("other", MeanConfig)


def replace_kind() -> type[AttentionConfig]:
    @dataclass(frozen=True, kw_only=True)
    class Impostor(MHAConfig):
        pass

    return Impostor


def test_a_class_that_is_no_config_is_refused() -> None:
    with pytest.raises(ValueError, match="dict cannot be an attention"):
        fathom.register_attention("mine", dict)  # pyright: ignore
    with pytest.raises(ValueError, match="derived from FFNConfig"):
        fathom.register_ffn("mean-for-test", MeanConfig)  # pyright: ignore


def test_a_class_that_lacks_a_count_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Half(FFNConfig):
        kind: Literal["half"] = "half"

        def build(self, dim: int) -> FFN:
            raise NotImplementedError

    with pytest.raises(ValueError, match="lacks flops_per_token, num_active_params, num_params"):
        fathom.register_ffn("half", Half)
