"""What must hold on a CUDA device: the CPU's numbers, no waiting, one graph a block."""

import pytest
import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.model import Decoder, build_model
from fathom.ops.attention import attention
from fathom.ops.grouped_mm import grouped_mm
from fathom.presets import preset
from fathom.settings import override, parse, to_data

pytestmark = pytest.mark.gpu

NAMES = ["tiny-llama", "tiny-gqa", "tiny-mla", "tiny-moe", "tiny-deepseek"]


def model_on(device: str, name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """The preset with weights large enough to matter, equal on every device."""
    cfg = parse(ModelConfig, override(to_data(preset(name)), ["init_std=0.1"]))
    return build_model(cfg, seed=1).to(device, dtype)


def batch(device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (4, 64), generator=generator)
    borders = torch.tensor([0, 20, 64, 128, 150, 192, 256], dtype=torch.int32)
    return tokens.to(device), tokens.roll(-1, 1).to(device), borders.to(device)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_cpus(name):
    found = []
    for device in ("cpu", "cuda"):
        model = model_on(device, name, torch.float32)
        losses = model.loss(*batch(device))
        losses.total.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        found.append((losses.total.item(), grads))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert (found[1][1] - found[0][1]).norm() / found[0][1].norm() < 2e-2  # TF32 is off by default


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_close_to_float32(name):
    wide, narrow = model_on("cuda", name), model_on("cuda", name, torch.bfloat16)
    want, got = wide.loss(*batch("cuda")).main, narrow.loss(*batch("cuda")).main
    assert got.item() == pytest.approx(want.item(), rel=2e-2)


@pytest.fixture
def no_waiting():
    """A switch that makes any wait for the device an error; off again after the test."""
    yield lambda: torch.cuda.set_sync_debug_mode(2)
    torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_never_waits_for_the_device(name, no_waiting):
    model = model_on("cuda", name, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs = batch("cuda")

    def step() -> None:
        losses = model.loss(*inputs, denominator=256)
        losses.total.backward()
        optimizer.step()
        model.update_expert_bias([routed.tokens_per_expert for routed in losses.routing])
        optimizer.zero_grad()

    step()
    no_waiting()
    step()


@pytest.mark.parametrize("name", NAMES)
def test_cached_decode_equals_the_full_forward(name):
    model, (tokens, _, _) = model_on("cuda", name), batch("cuda")
    cache = model.new_cache(4, 64)
    with torch.no_grad():
        sizes = [30, *[1] * 10, 24]
        steps = [model(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)]
        want = model(tokens)
    torch.testing.assert_close(torch.cat(steps, dim=1), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-deepseek"])
def test_a_compiled_model_gives_the_same_loss_and_gradients(name):
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = model_on("cuda", name, torch.bfloat16)
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True)
        losses = model.loss(*batch("cuda"))
        losses.total.backward()
        grads = torch.cat([p.grad.flatten().float() for p in model.parameters()])
        found.append((losses.main.item(), grads))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert (found[1][1] - found[0][1]).norm() / found[0][1].norm() < 0.1


@pytest.mark.parametrize("counts", [[0, 7, 0, 121], [128, 0, 0, 0], [32, 32, 32, 32], [0, 0, 0, 0]])
def test_grouped_mm_matches_float64_with_gradients(counts):
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    rows = sum(counts)
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(4, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = grouped_mm(x, w.mT, ends)
    out.float().square().sum().backward()
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts)).cuda()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    want = torch.einsum("nd,nfd->nf", x64, w64[owner])
    want.square().sum().backward()
    for got, exact in ((out, want), (x.grad, x64.grad), (w.grad, w64.grad)):
        scale = exact.abs().max().clamp(min=1) if exact.numel() else 1
        assert ((got.double() - exact).abs() / scale).max().item() < 2e-2 if rows else True


def test_long_rows_run_through_cudnn_at_mlas_widths():
    q, k, v = (
        torch.randn(2, 512, 16, width, device="cuda", dtype=torch.bfloat16)
        for width in (192, 192, 128)
    )
    want = attention(
        q.double(), k.double(), v.double(), scale=192**-0.5, causal=True, impl="reference"
    )
    got = attention(q, k, v, scale=192**-0.5, causal=True)
    assert (got.double() - want).abs().max() < 3e-2
