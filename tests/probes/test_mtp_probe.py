"""The probe of drafts, on models whose agreement is known."""

import pytest
import torch

from fathom.data.config import DataConfig
from fathom.data.dataset import open_dataset
from fathom.model import build_model
from fathom.presets import preset
from fathom.probes import PROBES, Context


def test_a_model_that_agrees_with_every_draft_writes_two_tokens_a_forward(monkeypatch):
    monkeypatch.setattr("fathom.probes.mtp.TEXTS", 2)
    model = build_model(preset("tiny-deepseek"), seed=0).eval()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.mtp[0].norm.weight.zero_()
    record = PROBES["mtp"].run(model, open_dataset(DataConfig()), Context(seq_len=64))
    assert record["accepted_on_text"] == record["accepted"] == record["same_tokens"] == 1
    assert record["tokens_per_forward"] == pytest.approx(2, rel=0.05)
    assert record["speedup"] > 0


def test_the_probe_leaves_a_model_without_drafts_alone():
    model = build_model(preset("tiny-llama"), seed=0)
    assert PROBES["mtp"].run(model, open_dataset(DataConfig()), Context(seq_len=64)) == {}
