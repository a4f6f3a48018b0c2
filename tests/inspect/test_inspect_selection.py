"""What a layer reads of a text: the figures, and the page that draws them."""

import base64
import hashlib
import json
import re

import pytest
import torch

from fathom.attention import AttentionConfig
from fathom.cli import main
from fathom.config import LayerGroup, ModelConfig
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.ffn import DenseConfig
from fathom.inspect import Look, look, write_page
from fathom.model import build_model
from kinds import dsa, mha, moba, nsa

TEXT = "The ring of keys hung by the door, and the door was locked. " * 3
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED / "tokenizer-1k.json")


def seen(tokenizer: Tokenizer, *attentions: AttentionConfig, text: str = TEXT, **options) -> Look:
    ffn = DenseConfig(inter_dim=16)
    groups = tuple(LayerGroup(count=1, attention=a, ffn=ffn) for a in attentions)
    model = build_model(ModelConfig(vocab_size=1024, dim=24, groups=groups), seed=1)
    return look(model, tokenizer, text, **options)


@pytest.mark.parametrize("attention", [moba(), nsa(), dsa()], ids=["moba", "nsa", "dsa"])
def test_a_query_reads_blocks_of_its_past_and_never_more_than_the_best_could_hold(
    attention, tokenizer
):
    found = seen(tokenizer, attention)
    length = len(found.tokens)
    assert "".join(found.tokens) == TEXT
    assert found.weights_HTT.shape == (4, length, length)
    torch.testing.assert_close(found.weights_HTT.sum(-1), torch.ones(4, length))
    assert not found.weights_HTT.triu(1).any()
    assert found.read_TIJ is not None
    assert found.selected_TI is not None
    assert found.best_TI is not None
    blocks = torch.arange(found.read_TIJ.shape[2]) * found.block_size
    assert not (found.read_TIJ & (blocks > torch.arange(length)[:, None, None])).any()
    assert (found.selected_TI <= found.best_TI + 1e-6).all()
    assert (found.selected_TI[0] == 1).all()


def test_the_first_layer_that_selects_is_shown_unless_one_is_named(tokenizer):
    assert seen(tokenizer, mha(), moba()).layer == 1
    dense = seen(tokenizer, mha(), moba(), layer=0)
    assert (dense.layer, dense.kind, dense.read_TIJ) == (0, "mha", None)
    assert seen(tokenizer, mha(), mha()).layer == 0


def test_no_more_than_max_tokens_are_read(tokenizer):
    assert len(seen(tokenizer, moba(), max_tokens=7).tokens) == 7


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"text": ""}, "the text is empty"),
        ({"layer": 2}, "layer must be from 0 to 0, got 2"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(options, word, tokenizer):
    with pytest.raises(ValueError, match=word):
        seen(tokenizer, moba(), **options)


def page_of(found: Look, tmp_path, **options) -> tuple[str, dict]:
    html = write_page(found, tmp_path / "a" / "page.html", title="<b>x", **options).read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    return html, json.loads(data[1])


def test_the_page_holds_what_was_seen(tokenizer, tmp_path):
    found = seen(tokenizer, moba())
    _, data = page_of(found, tmp_path, head=2)
    length = len(found.tokens)
    assert (data["head"], data["heads"], data["selections"]) == (2, 4, 4)
    assert data["tokens"] == found.tokens
    weights = torch.frombuffer(bytearray(base64.b64decode(data["weights"])), dtype=torch.uint8)
    rows = weights.view(4, length, length).double() / 255
    largest = found.weights_HTT.amax(-1, keepdim=True)
    torch.testing.assert_close(
        rows.square() * largest, found.weights_HTT.double(), rtol=0, atol=0.01
    )
    read = torch.frombuffer(bytearray(base64.b64decode(data["read"])), dtype=torch.uint8)
    assert found.read_TIJ is not None
    assert torch.equal(read.view(4, length, -1).bool(), found.read_TIJ.transpose(0, 1))


def test_the_page_needs_nothing_else_and_runs_only_its_own_script(tokenizer, tmp_path):
    html, _ = page_of(seen(tokenizer, mha()), tmp_path)
    assert not re.search(r"https?:|src=|href=|@import|url\(", html)
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in (
        html.replace("&#39;", "'")
    )
    assert "<b>" not in html


def test_a_hostile_text_stays_data(tokenizer, tmp_path):
    html, data = page_of(seen(tokenizer, moba(), text=HOSTILE), tmp_path)
    assert "".join(data["tokens"]) == HOSTILE
    assert html.count("<script") == 2
    assert "<img" not in html


def test_a_head_that_is_not_there_is_refused_before_anything_is_written(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="head must be from 0 to 3, got 4"):
        write_page(seen(tokenizer, mha()), tmp_path / "page.html", title="x", head=4)
    assert not list(tmp_path.iterdir())


def test_the_verb_draws_a_users_text_into_one_page(tmp_path, capsys):
    note, page = tmp_path / "note.txt", tmp_path / "page.html"
    note.write_text("the key of the lamp room was lost\n", encoding="utf-8")
    ask = ["inspect", "tiny-moba", "--text", str(note), "--out", str(page)]
    assert main([*ask, "--layer", "1"]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert "Layer 1 of 4" in page.read_text(encoding="utf-8")
    page.unlink()
    assert main([*ask, "--layer", "99"]) == 2
    assert "layer must be from 0 to 3, got 99" in capsys.readouterr().err
    note.unlink()
    assert main(ask) == 1
    assert "note.txt" in capsys.readouterr().err
    assert not page.exists()
