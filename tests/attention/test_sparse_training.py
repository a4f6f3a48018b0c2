"""MoBA and NSA train: on real text, under autocast, and compiled into one graph."""

import pytest
import torch

from fathom.attention import AttentionConfig
from fathom.config import LayerGroup, ModelConfig
from fathom.data.config import DataConfig
from fathom.data.dataset import open_dataset
from fathom.ffn import DenseConfig
from fathom.layers.step import Step
from fathom.model import Decoder, build_model
from fathom.probes.base import longest_passage
from kinds import DIM, mha, moba, nsa

BLOCKS = {"block_size": 8, "topk_blocks": 3}
SPARSE = {
    "moba": moba(**BLOCKS),
    "moba-key-conv": moba(key_conv_size=3, **BLOCKS),
    "nsa": nsa(cmp_block_size=8, cmp_stride=4, window_size=16, **BLOCKS),
}
every_sparse = pytest.mark.parametrize("cfg", SPARSE.values(), ids=SPARSE)


def model_of(attention: AttentionConfig) -> Decoder:
    group = LayerGroup(count=2, attention=attention, ffn=DenseConfig(inter_dim=48))
    return build_model(ModelConfig(vocab_size=1024, dim=DIM, groups=(group,)), seed=1)


def losses_of(attention: AttentionConfig, steps: int) -> list[float]:
    """Adam on rows of 64 tokens of real text; the loss of each step."""
    model = model_of(attention)
    text = longest_passage(model, open_dataset(DataConfig(seq_len=64)), 65 * 8 * 16, seed=0)
    rows = text.view(16, 8, 65)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        batch = rows[step % 16]
        loss = model.loss(batch[:, :-1], batch[:, 1:]).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@every_sparse
def test_training_lowers_the_loss(cfg):
    losses = losses_of(cfg, 40)
    assert losses[0] == pytest.approx(6.93, abs=0.1)
    assert losses[-1] < 5.6


@pytest.mark.slow
def test_after_300_steps_sparse_attention_is_within_3_percent_of_full():
    full = sum(losses_of(mha(), 300)[-16:])
    for cfg in SPARSE.values():
        assert sum(losses_of(cfg, 300)[-16:]) < 1.03 * full


@every_sparse
def test_bf16_autocast_is_close_to_float32(cfg):
    attention, x = cfg.build(DIM), torch.randn(2, 40, DIM)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    step = Step.full(x[..., 0])
    want = attention(x, step)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(x, step)
    assert (got - want).square().mean() < 0.01 * want.square().mean()


@pytest.mark.parametrize("cfg", [SPARSE["moba"], SPARSE["nsa"]], ids=["moba", "nsa"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_compiled_graph_has_eager_numbers(cfg, packed):
    attention, x = cfg.build(DIM), torch.randn(2, 20, DIM)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    borders = torch.tensor([0, 13, 20, 29, 40], dtype=torch.int32) if packed else None
    step = Step.full(x[..., 0], borders)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = []
    for run in (attention, compiled):
        out = run(x, step)
        found.append([out, *torch.autograd.grad(out.square().sum(), attention.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
