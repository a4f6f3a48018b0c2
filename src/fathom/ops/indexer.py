"""DSA's lightning indexer: which tokens a query reads, and how the indexer learns to say so.

``I[t,s] = sum_j w[t,j] relu(q[t,j] . k[s])``; a query reads the ``topk`` visible tokens of highest
score. The indexer learns by KL alone: ``softmax(I[t])`` is drawn to the main attention's own
weights (DeepSeek-V3.2-Exp report, equations 1 to 4). What a query may see is the interval from its
document's first token to itself: two indices, and no mask.

Scores exist for a chunk of queries at a time, in forward and backward.

Shapes: B batch, T queries, C queries of a chunk, S keys, J index heads, I index width, N selected
tokens, H main heads, G main key heads, Q main key width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fathom.ops.chunks import spans
from fathom.ops.registry import Impl, Implementations, choose, op, takes_all
from fathom.ops.registry import wide as wide_dtype

E4M3_MAX = 448.0


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernel needs."""
    if device != "cuda":
        return f"it needs CUDA tensors, got {device}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        return f"it needs bfloat16, float16, float32 or float8_e4m3fn, got {dtype}"
    if any(t.numel() == 0 for t in tensors):
        return f"it needs queries and keys, got shapes {[tuple(t.shape) for t in tensors]}"
    return ""


INDEX_TOPK = Implementations(
    op="index_topk", refusals={"triton": triton_refusal, "reference": takes_all}
)


def loss_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernels of the loss need of index and main queries and keys, and the selection."""
    if reason := triton_refusal(device, dtype, *tensors):
        return reason
    if len(tensors) == 4:
        return "it needs selected tokens: over all of them PyTorch's products run"
    if not tensors:
        return ""
    width, groups, main_width = tensors[0].shape[-1], *tensors[3].shape[2:]
    rest = main_width - (1 << (main_width.bit_length() - 1))
    if groups > 1 or rest < 16 or rest & (rest - 1):
        return f"it needs one main key of two powers of two, got {groups} of {main_width}"
    if width < 32 or width & (width - 1) or tensors[0].shape[2] > 128:
        return f"it needs at most 128 index heads of 32, 64, 128, ... channels, got {width}"
    return ""


INDEX_LOSS = Implementations(
    op="index_loss", refusals={"triton": loss_refusal, "reference": takes_all}
)


def index_scores(
    q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, k_scale_BS: Tensor | None = None
) -> Tensor:
    """``sum_j w[t,j] relu(q[t,j] . k[s])``, ``[B, T, S]``, float32 (float64 for float64).

    Args:
        q_BTJI: index queries.
        k_BSI: index keys, one per token, shared by all index heads.
        weight_BTJ: weight of each head for each query, of either sign.
        k_scale_BS: what a token's scores are multiplied by, above 0; None: 1.
    """
    dtype = wide_dtype(weight_BTJ.dtype)
    z_BTJS = torch.einsum("btji,bsi->btjs", q_BTJI.to(dtype), k_BSI.to(dtype)).relu()
    scores_BTS = torch.einsum("btjs,btj->bts", z_BTJS, weight_BTJ.to(dtype))
    return scores_BTS if k_scale_BS is None else scores_BTS * k_scale_BS[:, None].to(dtype)


def hadamard(x: Tensor) -> Tensor:
    """The normalised Hadamard transform of the last dimension, a power of two.

    It leaves dot products as they are and spreads what stands out over all channels.
    """
    width, half = x.shape[-1], 1
    while half < width:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x, half = torch.stack([a + b, a - b], dim=-2).flatten(-3), 2 * half
    return x * width**-0.5


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in E4M3, and for each the power of two, float32, that multiplies it back."""
    largest = x.abs().amax(-1).float().clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def index_topk(
    q_BTJI: Tensor,
    k_BSI: Tensor,
    weight_BTJ: Tensor,
    places_BT: Tensor,
    begins_BT: Tensor,
    *,
    topk: int,
    k_scale_BS: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The visible tokens of highest index score, int32 ``[B, T, min(topk, S)]``, -1 for none.

    Args:
        q_BTJI, k_BSI, weight_BTJ, k_scale_BS: as of :func:`index_scores`; q and k may be in E4M3.
        places_BT: each query's own index among the keys: the last that it sees.
        begins_BT: the first that it sees.
        topk: how many to select.
        impl: which implementation.

    Among equal scores the lowest index is taken; scores of exactly 0 are common, where every head
    is shut. Not differentiable.

    Raises:
        ValueError: ``topk`` below 1, or a refused ``impl``.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    q_BTJI, k_BSI, weight_BTJ = (t.detach() for t in (q_BTJI, k_BSI, weight_BTJ))
    chosen = choose(INDEX_TOPK, impl, q_BTJI, k_BSI, weight_BTJ)
    return _index_topk(q_BTJI, k_BSI, weight_BTJ, k_scale_BS, places_BT, begins_BT, topk, chosen)


def visible(places_BT: Tensor, begins_BT: Tensor, n_keys: int) -> Tensor:
    """Bool ``[B, T, S]``: the keys from ``begins`` to ``places``."""
    keys_S = torch.arange(n_keys, device=places_BT.device)
    return (keys_S <= places_BT[..., None]) & (keys_S >= begins_BT[..., None])


def _topk_flops(q: Sequence[int], k: Sequence[int], *_: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[1] * (q[3] + 1)


@op(
    "index_topk",
    fake=lambda q, k, w, scale, places, begins, topk, impl: q.new_empty(
        *q.shape[:2], min(topk, k.shape[1]), dtype=torch.int32
    ),
    flops=_topk_flops,
)
def _index_topk(
    q_BTJI: Tensor,
    k_BSI: Tensor,
    weight_BTJ: Tensor,
    k_scale_BS: Tensor | None,
    places_BT: Tensor,
    begins_BT: Tensor,
    topk: int,
    impl: str,
) -> Tensor:
    batch, n_queries, n_heads, _ = q_BTJI.shape
    n_keys = k_BSI.shape[1]
    if impl == "triton":
        from fathom.ops.triton import indexer as kernel

        topk = min(topk, n_keys)
        tensors = q_BTJI, k_BSI, weight_BTJ, k_scale_BS, places_BT, begins_BT
        return kernel.index_topk(*tensors, topk)
    out_BTN = places_BT.new_empty(batch, n_queries, min(topk, n_keys), dtype=torch.int32)
    for c in spans(n_queries, batch * n_heads * n_keys):
        scores_BCS = index_scores(q_BTJI[:, c], k_BSI, weight_BTJ[:, c], k_scale_BS)
        seen_BCS = visible(places_BT[:, c], begins_BT[:, c], n_keys)
        scores_BCS = scores_BCS.masked_fill(~seen_BCS, float("-inf"))
        order_BCS = scores_BCS.sort(dim=-1, descending=True, stable=True).indices
        best_BCN = order_BCS[..., : out_BTN.shape[-1]]
        out_BTN[:, c] = best_BCN.where(seen_BCS.gather(-1, best_BCN), -1)
    return out_BTN


def index_loss(
    q_BTJI: Tensor,
    k_BSI: Tensor,
    weight_BTJ: Tensor,
    main_q_BTHQ: Tensor,
    main_k_BSGQ: Tensor,
    places_BT: Tensor,
    begins_BT: Tensor,
    *,
    scale: float,
    selected_BTN: Tensor | None = None,
    main_lse_BTH: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mean over queries of ``KL(p || softmax(I))`` in nats, a float32 scalar (float64 for float64).

    ``p`` is the mean over heads of ``softmax(scale main_q . main_k)``: a fixed target, so gradients
    go to q, k and weight alone. Both softmaxes are over the same tokens.

    Args:
        q_BTJI, k_BSI, weight_BTJ, places_BT, begins_BT: as of :func:`index_topk`.
        main_q_BTHQ: queries of the main attention.
        main_k_BSGQ: its keys; head h reads key head ``h // (H / G)``.
        scale: of the main attention's scores.
        selected_BTN: over these tokens (-1: none, but at least one a query); None: over all that
            are visible.
        main_lse_BTH: log-sum-exp in base 2 of the main attention's scores over these tokens, if
            it is known: saves the kernels a pass.
        impl: which implementation.

    Raises:
        ValueError: a refused ``impl``.
    """
    trained = any(t.requires_grad for t in (q_BTJI, k_BSI, weight_BTJ))
    tokens = () if selected_BTN is None else (selected_BTN,)
    chosen = choose(INDEX_LOSS, impl, q_BTJI, k_BSI, main_q_BTHQ, main_k_BSGQ, *tokens)
    loss, *_ = _index_loss(
        q_BTJI,
        k_BSI,
        weight_BTJ,
        main_q_BTHQ.detach(),
        main_k_BSGQ.detach(),
        places_BT,
        begins_BT,
        scale,
        selected_BTN,
        main_lse_BTH,
        trained and torch.is_grad_enabled(),
        chosen,
    )
    return loss


def rows_of_all(k_BSI: Tensor, selected_BTN: Tensor) -> Tensor:
    """A selection as indices into the keys of all rows, ``[B T, N]``; -1 stays."""
    first_B = torch.arange(len(k_BSI), device=k_BSI.device, dtype=torch.int32) * k_BSI.shape[1]
    there = selected_BTN >= 0
    return (selected_BTN + first_B[:, None, None]).where(there, -1).flatten(0, 1).contiguous()


def gathered(x_BSF: Tensor, selected_BCN: Tensor) -> Tensor:
    """Each query's selected rows, ``[B, C, N, F]``; for -1 the first."""
    rows_B = torch.arange(x_BSF.shape[0], device=x_BSF.device)[:, None, None]
    return x_BSF[rows_B, selected_BCN.clamp(min=0)]


def attention_mass(q_BCHQ: Tensor, k: Tensor, seen_BCN: Tensor, scale: float) -> Tensor:
    """Mean over heads of the main attention's weights, ``[B, C, N]``.

    Args:
        q_BCHQ: queries.
        k: keys, ``[B, N, G, Q]``, or of each query its own, ``[B, C, N, G, Q]``.
        seen_BCN: what each query sees.
        scale: of the scores.
    """
    keys = "bngq" if k.dim() == 4 else "bcngq"
    q_BCGRQ = q_BCHQ.unflatten(2, (k.shape[-2], -1))
    scores_BCGRN = scale * torch.einsum(f"bcgrq,{keys}->bcgrn", q_BCGRQ, k)
    hidden = ~seen_BCN[:, :, None, None]
    return scores_BCGRN.masked_fill(hidden, float("-inf")).softmax(-1).mean(dim=(2, 3))


def chunk_loss(
    q_BCJI: Tensor, k: Tensor, weight_BCJ: Tensor, seen_BCN: Tensor, target_BCN: Tensor
) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """The sum of the chunk's KL, and a function that gives its gradients in q, k and weight.

    ``k`` is ``[B, N, I]``, or ``[B, C, N, I]``; ``dI = softmax(I) - p``, and the rest follows.
    """
    keys = "bni" if k.dim() == 3 else "bcni"
    z_BCJN = torch.einsum(f"bcji,{keys}->bcjn", q_BCJI, k).relu_()
    scores_BCN = torch.einsum("bcjn,bcj->bcn", z_BCJN, weight_BCJ)
    log_BCN = scores_BCN.masked_fill(~seen_BCN, float("-inf")).log_softmax(-1)
    cross_BCN = target_BCN * log_BCN.masked_fill(~seen_BCN, 0)
    loss = (torch.xlogy(target_BCN, target_BCN) - cross_BCN).sum()

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        slope_BCN = log_BCN.exp() - target_BCN
        dweight_BCJ = torch.einsum("bcjn,bcn->bcj", z_BCJN, slope_BCN)
        dz_BCJN = slope_BCN[:, :, None] * weight_BCJ[..., None] * (z_BCJN > 0)
        dq_BCJI = torch.einsum(f"bcjn,{keys}->bcji", dz_BCJN, k)
        return dq_BCJI, torch.einsum(f"bcjn,bcji->{keys}", dz_BCJN, q_BCJI), dweight_BCJ

    return loss, gradients


def _fake_loss(
    q: Tensor, k: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_dtype(q.dtype)
    grads = [t.new_empty(t.shape if rest[-2] else 0, dtype=dtype) for t in (q, k, weight)]
    return q.new_empty((), dtype=dtype), grads[0], grads[1], grads[2]


def _loss_flops(
    q: Sequence[int],
    k: Sequence[int],
    weight: Sequence[int],
    main_q: Sequence[int],
    main_k: Sequence[int],
    places: Sequence[int],
    begins: Sequence[int],
    scale: float,
    selected: Sequence[int] | None,
    lse: Sequence[int] | None,
    need_grads: bool,
    impl: str,
) -> int:
    pairs = q[0] * q[1] * (k[1] if selected is None else selected[2])
    return 2 * pairs * (q[2] * q[3] * (1 + 2 * need_grads) + main_q[2] * main_q[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [t.dtype for t in inputs[:3]]


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((grad * t).to(dtype) for t, dtype in pairs), *[None] * 9


@op("index_loss", fake=_fake_loss, flops=_loss_flops, setup=_setup, backward=_backward)
def _index_loss(
    q_BTJI: Tensor,
    k_BSI: Tensor,
    weight_BTJ: Tensor,
    main_q_BTHQ: Tensor,
    main_k_BSGQ: Tensor,
    places_BT: Tensor,
    begins_BT: Tensor,
    scale: float,
    selected_BTN: Tensor | None,
    main_lse_BTH: Tensor | None,
    need_grads: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and, while a chunk's scores are there, its gradients; no elements if not needed."""
    if impl == "triton":
        assert selected_BTN is not None
        from fathom.ops.triton import index_loss as kernel

        total, grads = kernel.index_loss(
            q_BTJI.flatten(0, 1).contiguous(),
            k_BSI.flatten(0, 1).contiguous(),
            weight_BTJ.flatten(0, 1).float().contiguous(),
            main_q_BTHQ.flatten(0, 1).contiguous(),
            main_k_BSGQ.flatten(0, 2).contiguous(),
            rows_of_all(k_BSI, selected_BTN),
            None if main_lse_BTH is None else main_lse_BTH.flatten(0, 1).contiguous(),
            scale,
            need_grads,
        )
        if not need_grads:
            return total, grads[0], grads[1], grads[2]
        shapes = q_BTJI.shape, k_BSI.shape, weight_BTJ.shape
        dq, dk, dweight = (grad.view(shape) for grad, shape in zip(grads, shapes, strict=True))
        return total, dq, dk, dweight
    dtype = wide_dtype(q_BTJI.dtype)
    q_BTJI, k_BSI, weight_BTJ, main_q, main_k = (
        t.to(dtype) for t in (q_BTJI, k_BSI, weight_BTJ, main_q_BTHQ, main_k_BSGQ)
    )
    grads = [torch.zeros_like(t) for t in (q_BTJI, k_BSI, weight_BTJ)] if need_grads else []
    total, count = q_BTJI.new_zeros(()), places_BT.numel()
    for c in spans(q_BTJI.shape[1], _numbers(q_BTJI, k_BSI, main_q, main_k, selected_BTN)):
        if selected_BTN is None:
            chosen_BCN, k, own_main_k = None, k_BSI, main_k
            seen_BCN = visible(places_BT[:, c], begins_BT[:, c], k_BSI.shape[1])
        else:
            chosen_BCN = selected_BTN[:, c]
            k, own_main_k = gathered(k_BSI, chosen_BCN), gathered(main_k, chosen_BCN)
            seen_BCN = chosen_BCN >= 0
        target_BCN = attention_mass(main_q[:, c], own_main_k, seen_BCN, scale)
        loss, gradients = chunk_loss(q_BTJI[:, c], k, weight_BTJ[:, c], seen_BCN, target_BCN)
        total += loss / count
        if need_grads:
            dq, dk, dweight = (t / count for t in gradients())
            grads[0][:, c], grads[2][:, c] = dq, dweight
            _add_rows(grads[1], dk, chosen_BCN)
    if not need_grads:
        grads = [t.new_empty(0) for t in (q_BTJI, k_BSI, weight_BTJ)]
    return total, grads[0], grads[1], grads[2]


def _numbers(
    q_BTJI: Tensor, k_BSI: Tensor, main_q: Tensor, main_k: Tensor, selected_BTN: Tensor | None
) -> int:
    """Of one query's scores, and of its own copy of the keys where it selects them."""
    heads, width = q_BTJI.shape[2] + main_q.shape[2], k_BSI.shape[1]
    if selected_BTN is not None:
        heads, width = heads + k_BSI.shape[-1] + main_k[0, 0].numel(), selected_BTN.shape[-1]
    return q_BTJI.shape[0] * width * heads


def _add_rows(into_BSI: Tensor, rows: Tensor, chosen_BCN: Tensor | None) -> None:
    """Add each query's rows where they came from; by sorting on CUDA, so in a fixed order."""
    if chosen_BCN is None:
        into_BSI += rows
        return
    rows_B = torch.arange(len(into_BSI), device=rows.device)[:, None, None].expand_as(chosen_BCN)
    into_BSI.index_put_((rows_B, chosen_BCN.clamp(min=0)), rows, accumulate=True)
