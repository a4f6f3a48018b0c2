"""The indexer's kernels: interpreted in float32, on a GPU at their real tiles."""

import pytest
import torch
from torch import Tensor

from fathom.ops.indexer import _index_topk, index_scores, quantise_rows, triton_refusal
from fathom.ops.triton import indexer as kernels
from ops.guards import Guards
from ops.hopper import SHARED_LIMIT, Source, build

SHAPES = {  # B, T, S, J, W, topk
    "packed": (2, 21, 21, 3, 10, 5),
    "decode": (1, 2, 37, 2, 16, 7),
    "one": (1, 1, 1, 1, 16, 1),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles and chunks at lengths that are interpreted in a moment."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(kernels.SCORE_TILE, "QUERIES", 16)
        monkeypatch.setitem(kernels.SCORE_TILE, "KEYS", 16)
        monkeypatch.setitem(kernels.SELECT_TILE, "KEYS", 8)
        monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 4 * 37 * 16)


def tensors(shape, device="cpu", dtype=torch.float32) -> tuple[Tensor, ...]:
    """Queries are the last of the keys; in each row a document begins at a third of the keys."""
    batch, length, keys, heads, width, _ = shape
    q = torch.randn(batch, length, heads, width, device=device, dtype=dtype)
    k = torch.randn(batch, keys, width, device=device, dtype=dtype)
    weight = torch.randn(batch, length, heads, device=device)
    places = torch.arange(keys - length, keys, device=device).expand(batch, -1)
    border = keys // 3
    return q, k, weight, places, torch.where(places >= border, border, 0)


@pytest.mark.parametrize("equal", [False, True], ids=["scores", "many-ties"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_selection_is_the_references(shape, equal):
    q, k, weight, places, begins = tensors(shape)
    if equal:  # scores of whole numbers, among them many of 0 and -0
        q, k, weight = q.round(), k.round(), weight.sign()
    scale = None if equal else torch.rand(k.shape[:2])
    inputs = q, k, weight, scale, places, begins, shape[5]
    found, want = (_index_topk(*inputs, impl) for impl in ("triton", "reference"))
    assert torch.equal(found.sort(-1).values, want.sort(-1).values)
    there = found >= 0
    assert torch.equal(there, there.sort(-1, descending=True).values)  # none stands behind
    assert all(row[row >= 0].diff().gt(0).all() for row in found.flatten(0, 1))  # in order


def test_nothing_is_written_outside_of_what_is_allocated():
    q, k, weight, places, begins = tensors(SHAPES["packed"])
    with Guards() as guards:
        kernels.index_topk(q, k, weight, None, places, begins, 5)
    guards.check()


TYPES = {
    **dict.fromkeys(("q", "k"), "*bf16"),
    **dict.fromkeys(("weight", "scores", "k_scale"), "*fp32"),
    **dict.fromkeys(("places", "begins", "selected"), "*i32"),
    **dict.fromkeys(("n_keys", "topk"), "i32:16"),
    "n_queries": "i32",
}


def source(name: str, tile: dict[str, int], **constants: int | str) -> Source:
    """``constants`` may also give another type of q and k."""
    function = getattr(kernels, name)
    sizes = constants | {key: tile[key] for key in tile if key.isupper()}
    options = {key: tile[key] for key in tile if not key.isupper()}
    code = function.fn.__code__
    names = code.co_varnames[: code.co_argcount]
    arguments = {name: sizes[name] if name in sizes else TYPES[name] for name in names}
    return Source(f"{kernels.__name__}:{name}", arguments, options)


SCORES = {"QUERIES": 128, "KEYS": 128, "num_warps": 8, "num_stages": 3}
SELECT = {"KEYS": 4096, "num_warps": 8, "num_stages": 2}


def test_they_compile_for_hopper_without_spilling():
    widths = {"J": 64, "W": 128, "WP": 128}
    scores, small, _ = built = build(
        source("_scores", SCORES, SCALED=False, **widths),
        source("_scores", SCORES, SCALED=True, q="*fp8e4nv", k="*fp8e4nv", **widths),
        source("_select", SELECT),
    )
    assert scores.wgmma
    assert small.wgmma
    assert not any(kernel.spilled for kernel in built)
    assert max(kernel.shared for kernel in built) <= SHARED_LIMIT


def test_the_kernel_says_what_it_needs():
    assert "CUDA tensors" in triton_refusal("cpu", torch.float32)
    assert "bfloat16, float16, float32 or float8" in triton_refusal("cuda", torch.float64)
    assert "queries and keys" in triton_refusal("cuda", torch.float32, torch.empty(0, 2))
    assert not triton_refusal("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_on_a_gpu_the_selection_is_the_references_but_for_rounding(fp8):
    shape = 2, 700, 5000, 64, 128, 2048
    q, k, weight, places, begins = tensors(shape, "cuda", torch.bfloat16)
    scale = None
    if fp8:
        (q, q_scale), (k, scale) = quantise_rows(q), quantise_rows(k)
        weight = weight * q_scale
    found = _index_topk(q, k, weight, scale, places, begins, 2048, "triton")
    scores = index_scores(q.float(), k.float(), weight, scale)
    for b, t in ((0, 0), (1, 350), (1, 699)):
        own = found[b, t][found[b, t] >= 0].long()
        first, last = int(begins[b, t]), int(places[b, t])
        assert len(own) == len(own.unique()) == min(2048, last + 1 - first)
        assert ((own >= first) & (own <= last)).all()
        row = scores[b, t, first : last + 1]
        least = row.topk(len(own)).values.min()
        assert scores[b, t, own].min() > least - 1e-3 * row.abs().max()
