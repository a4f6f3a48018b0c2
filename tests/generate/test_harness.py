"""The adapter for lm-evaluation-harness, and, where that is installed, a task of its own form."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fathom.config import ModelConfig
from fathom.model import build_model
from fathom.presets import preset

try:
    import lm_eval
except ImportError:  # then the base class, which only lists the questions, is stood in for
    lm_eval = None
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = type("LM", (), {})  # pyright: ignore

from fathom.generate.harness import FathomLM, windows


def ask(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def lm() -> FathomLM:
    cfg = preset("tiny-gqa")
    cfg = ModelConfig(vocab_size=1024, dim=cfg.dim, groups=cfg.groups, max_seq_len=48, init_std=0.2)
    return FathomLM(build_model(cfg, seed=1), batch_size=3)


def logprobs(lm: FathomLM, ids: list[int]) -> torch.Tensor:
    """ln p of each id after the first, by one forward alone."""
    with torch.no_grad():
        rows = lm.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return rows.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_a_continuation_is_scored_behind_its_context(lm: FathomLM) -> None:
    pairs = [("The cat", " sat on"), ("", "Emma"), ("a b c d e f", " g"), ("It is ", "so")]
    got = lm.loglikelihood([ask(*pair) for pair in pairs])
    for (context, continuation), (value, _) in zip(pairs, got, strict=True):
        ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(context + continuation)]
        scored = len(ids) - 1 - len(lm.tokenizer.encode(context.rstrip()))
        assert value == pytest.approx(logprobs(lm, ids)[-scored:].sum().item(), abs=1e-4)


def test_what_greedy_decoding_says_is_known_as_such(lm: FathomLM) -> None:
    start = [lm.tokenizer.bos_id, 40, 41]
    (said,) = lm.engine.generate([start], max_new_tokens=2, symbols=True)
    with torch.no_grad():
        first = int(lm.model(torch.tensor([start]))[0, -1].argmax())
    other = (first + 1) % 1024
    assert lm.score([([*start, first], 1), ([*start, other], 1)])[0][1]
    assert not lm.score([([*start, other], 1)])[0][1]
    assert len(said.tokens) <= 2


def test_a_context_that_is_too_long_loses_its_beginning(lm: FathomLM) -> None:
    context = "word " * 100
    ((value, _),) = lm.loglikelihood([ask(context, "end")])
    ids = lm.tokenizer.encode(context + "end")[-49:]
    scored = len(lm.tokenizer.encode(context + "end")) - len(lm.tokenizer.encode(context.rstrip()))
    assert value == pytest.approx(logprobs(lm, ids)[-scored:].sum().item(), abs=1e-4)
    with pytest.raises(ValueError, match="is too long"):
        lm.loglikelihood([ask("a", " word" * 100)])
    with pytest.raises(ValueError, match="must hold a token"):
        lm.loglikelihood([ask("a", "")])


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 11])
def test_windows_score_each_id_once_with_most_context(length: int) -> None:
    ids = list(range(100, 100 + length))
    rows = list(windows([7], ids, 4))
    assert [i for row, scored in rows for i in row[len(row) - scored :]] == ids
    assert all(len(row) <= 5 and scored < len(row) for row, scored in rows)
    assert all(len(row) == 5 for row, _ in rows[1:])


def test_the_whole_of_a_text_is_scored(lm: FathomLM) -> None:
    text = "So it was. " * 12
    ids = lm.tokenizer.encode(text)
    got, none = lm.loglikelihood_rolling([ask(text), ask("")])
    want = logprobs(lm, [lm.tokenizer.bos_id, *ids[:48]]).sum()
    assert len(ids) <= 96
    want += logprobs(lm, ids[-49:])[-(len(ids) - 48) :].sum()
    assert got == pytest.approx(want.item(), abs=1e-3)
    assert none == 0


def test_generation_follows_the_settings_of_a_task(lm: FathomLM) -> None:
    plain, stopped, long = lm.generate_until(
        [
            ask("Emma", {"max_gen_toks": 8}),
            ask("Emma", {"max_gen_toks": 8, "until": "e", "do_sample": False, "temperature": 1}),
            ask("word " * 100, {"max_gen_toks": 8, "do_sample": True, "until": ["", "\n\n"]}),
        ]
    )
    assert stopped == plain.split("e")[0]
    assert isinstance(long, str)


@pytest.mark.slow
@pytest.mark.skipif(lm_eval is None, reason="needs lm-eval: pip install 'fathom-lm[eval]'")
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_runs_through_the_harness(lm: FathomLM, tmp_path: Path, monkeypatch) -> None:
    from lm_eval import simple_evaluate  # pyright: ignore

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    questions = [
        {"question": f"{n} and one is", "choices": [f" {n + 1}", " blue"], "answer": 0}
        for n in range(5)
    ]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in questions))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]["sums"]
    right = 0
    for question in questions:
        asked = [ask(question["question"], choice) for choice in question["choices"]]
        first, second = (value for value, _ in lm.loglikelihood(asked))
        right += first > second
    assert found["acc,none"] == pytest.approx(right / 5)
