"""Learning rate and batch size as pure functions of the step.

A step's *share* is the part of training done before it, 0 up to just below 1. Shares count steps.
"""

import math

from fathom.train.config import RunConfig, TrainConfig


def lr_factor(cfg: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (from 0) as a share of ``cfg.lr``."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    share = step / cfg.steps
    match cfg.schedule:
        case "constant":
            return 1.0
        case "cosine":
            start = cfg.warmup_steps / cfg.steps
            return _cosine((share - start) / (1 - start), cfg.min_lr_ratio)
        case "wsd":
            return _wsd(share, cfg.decay_share, cfg.min_lr_ratio)
        case "deepseek_v3":
            return _deepseek_v3(share)
        case "multi_step":
            return _multi_step(share)


def _cosine(part: float, low: float) -> float:
    """From 1 to ``low`` as ``part`` goes from 0 to 1."""
    return low + (1 - low) * (1 + math.cos(math.pi * part)) / 2


def _wsd(share: float, decay_share: float, low: float) -> float:
    """Warm up, stay, decay (MiniCPM, arXiv:2404.06395): the last ``decay_share`` falls linearly."""
    start = 1 - decay_share
    return 1.0 if share <= start else 1 - (1 - low) * (share - start) / decay_share


def _deepseek_v3(share: float) -> float:
    """DeepSeek-V3 (arXiv:2412.19437, section 4.2), in T tokens: 10 flat, 4.3 of cosine to a tenth,
    0.333 at a tenth, 0.167 at 7.3e-6 of 2.2e-4."""
    done = share * 14.8
    if done < 10:
        return 1.0
    if done < 14.3:
        return _cosine((done - 10) / 4.3, 0.1)
    return 0.1 if done < 14.633 else 7.3e-6 / 2.2e-4


def _multi_step(share: float) -> float:
    """DeepSeek LLM and MoE (arXiv:2401.06066, section 4.1.2): times 0.316 at 80 % and at 90 %."""
    return 0.316 ** ((share >= 0.8) + (share >= 0.9))


def rows_at(cfg: RunConfig, step: int) -> int:
    """Rows of step ``step`` (from 0): growing linearly by whole micro-batches through the ramp."""
    start, full = cfg.train.ramp_from_tokens, cfg.rows_per_step
    if start is None or step >= cfg.train.ramp_steps:
        return full
    first, unit = start // cfg.data.seq_len, cfg.train.micro_batch_size or 1
    return first + (full - first) // unit * step // cfg.train.ramp_steps * unit
