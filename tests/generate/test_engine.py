"""The engine against plain full forwards, and what ends, bars and streams a text."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fathom
from fathom.config import LayerGroup, ModelConfig
from fathom.convert.checkpoint import Origin
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.ffn import DenseConfig
from fathom.generate import Engine
from fathom.generate import engine as engine_module
from fathom.generate.defaults import Settings
from fathom.generate.engine import tokenizer_of
from fathom.model import Decoder, build_model
from fathom.presets import preset
from kinds import DIM, KINDS

TOKENIZER = Tokenizer.load(BUNDLED / "tokenizer-1k.json")
PROMPTS = [[5, 9, 2, 7, 1], [3], [8, 8, 4]]


def model_of(kind: str, vocab_size: int = 40, max_seq_len: int = 64) -> Decoder:
    group = LayerGroup(count=2, attention=KINDS[kind], ffn=DenseConfig(inter_dim=32))
    cfg = ModelConfig(
        vocab_size=vocab_size, dim=DIM, groups=(group,), max_seq_len=max_seq_len, init_std=0.4
    )
    return build_model(cfg, seed=1)


def greedy(model: Decoder, prompt: list[int], n: int) -> list[int]:
    """By whole forwards, without a cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@dataclass
class Scripted:
    """A stand-in for a decoder: whatever comes in, it says the next id of its script."""

    script: list[int]
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        self.cfg = preset("tiny-llama")
        self.embed = nn.Embedding(1, 1)
        self.said = 0

    def new_cache(self, batch_size: int, capacity: int):
        return build_model(preset("tiny-llama"), seed=0).new_cache(batch_size, capacity)

    def __call__(self, tokens_BT: Tensor, *, cache, starts_B=None) -> Tensor:
        logits = torch.zeros(*tokens_BT.shape, self.vocab_size)
        logits[..., self.script[self.said]] = 9.0
        logits[..., TOKENIZER.encode("?")[0]] = 5.0
        self.said += 1
        return logits


def say(script: list[int], **options):
    model = Scripted([*script, *[0] * 64])
    (result,) = Engine(model, TOKENIZER).generate(["hi"], **options)  # pyright: ignore
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length_together_give_what_each_gives_alone(kind: str) -> None:
    model = model_of(kind)
    together = Engine(model).generate(PROMPTS, max_new_tokens=8)
    for prompt, got in zip(PROMPTS, together, strict=True):
        assert got.tokens == greedy(model, prompt, 8)
        assert got.finish_reason == "length"
        assert got.text == ""


def test_the_whole_deepseek_decodes_as_its_full_forward() -> None:
    model = build_model(preset("tiny-deepseek"), seed=3)
    engine = Engine(model)
    prompt = engine.tokenizer.encode("for x in range(") if engine.tokenizer else []
    (got,) = engine.generate([prompt], max_new_tokens=6, symbols=True)
    ids = list(prompt)
    for token in got.tokens:
        logits = model(torch.tensor([ids]))[0, -1]
        logits[TOKENIZER.bos_id] = -torch.inf
        assert token == int(logits.argmax())
        ids.append(token)


def test_a_prompt_read_in_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("gqa", "window", "mla"):
        model, prompt = model_of(kind), [list(range(1, 30))]
        (whole,) = Engine(model).generate(prompt, max_new_tokens=5)
        monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 4)
        (chunked,) = Engine(model).generate(prompt, max_new_tokens=5)
        monkeypatch.undo()
        assert chunked == whole


def test_a_seed_repeats_a_text_and_its_neighbours_do_not_change_it() -> None:
    model = model_of("gqa")
    draw = {"max_new_tokens": 12, "temperature": 1.0}
    first = Engine(model).generate(PROMPTS, seed=5, **draw)
    assert Engine(model).generate(PROMPTS, seed=5, **draw) == first
    assert Engine(model).generate(PROMPTS[:1], seed=5, **draw) == first[:1]
    assert Engine(model).generate(PROMPTS, seed=6, **draw) != first


def test_one_prompt_twice_is_drawn_twice() -> None:
    one, other = Engine(model_of("gqa")).generate([[1, 2]] * 2, max_new_tokens=12, temperature=1.0)
    assert one.tokens != other.tokens


def test_the_end_of_text_token_ends_a_text() -> None:
    words = TOKENIZER.encode("so it is")
    got = say([*words, TOKENIZER.eos_id, *words])
    assert got.text == "so it is"
    assert got.tokens == [*words, TOKENIZER.eos_id]
    assert got.finish_reason == "eos"


def test_a_text_may_end_at_once() -> None:
    got = say([TOKENIZER.eos_id])
    assert (got.text, got.tokens, got.finish_reason) == ("", [TOKENIZER.eos_id], "eos")


def test_a_stop_string_ends_a_text_and_is_not_part_of_it() -> None:
    ids = TOKENIZER.encode("one, two, three")
    got = say(ids, stop=["o, th"])
    assert got.text == "one, tw"
    assert got.finish_reason == "stop"
    assert len(got.tokens) < len(ids)


def test_other_rows_go_on_when_one_has_ended() -> None:
    ids = [*TOKENIZER.encode("ab"), TOKENIZER.eos_id, *TOKENIZER.encode("cd")]
    short = len(TOKENIZER.encode("ab")) + 1

    class OneEnds(Scripted):
        def __call__(self, tokens_BT, *, cache, starts_B=None):
            logits = super().__call__(tokens_BT, cache=cache, starts_B=starts_B)
            if len(tokens_BT) == 2:  # not a prefill: the second row never ends
                logits[1:, :, TOKENIZER.eos_id] = -9.0
            return logits

    script = [ids[0], *ids[:1], *ids[1:], *[0] * 9]  # the first two: one prefill a row
    engine = Engine(OneEnds(script), TOKENIZER)  # pyright: ignore
    first, second = engine.generate(["x", "y"], max_new_tokens=5)
    assert (len(first.tokens), first.finish_reason) == (short, "eos")
    assert (len(second.tokens), second.finish_reason) == (5, "length")


def test_ids_that_no_text_holds_are_never_chosen() -> None:
    pixel, mark = TOKENIZER.text_vocab_size + 2, TOKENIZER.encode("?")
    assert say([pixel, TOKENIZER.bos_id], max_new_tokens=2).tokens == mark * 2
    assert say([pixel], max_new_tokens=1, symbols=True).tokens == [pixel]


def test_ids_beyond_the_vocabulary_of_the_tokenizer_are_never_chosen() -> None:
    model = Scripted([1030, *[0] * 4], vocab_size=1100)
    model.cfg = ModelConfig(vocab_size=1100, dim=8, groups=model.cfg.groups)
    (got,) = Engine(model, TOKENIZER).generate(["a"], max_new_tokens=1)  # pyright: ignore
    assert got.tokens == TOKENIZER.encode("?")


def test_streamed_pieces_add_up_to_each_text() -> None:
    model = build_model(preset("tiny-gqa"), seed=2)
    pieces: list[tuple[int, str]] = []
    results = Engine(model).generate(
        ["A", "漢 and", ""],
        max_new_tokens=24,
        temperature=1.5,
        seed=1,
        stop=["e"],
        stream=lambda place, piece: pieces.append((place, piece)),
    )
    for place, result in enumerate(results):
        assert "".join(piece for where, piece in pieces if where == place) == result.text
        if result.finish_reason == "length":
            assert result.text == TOKENIZER.decode(result.tokens)


def test_a_text_prompt_begins_with_the_begin_of_text_token() -> None:
    model = build_model(preset("tiny-llama"), seed=2)
    (text,) = Engine(model).generate(["Emma"], max_new_tokens=4)
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("Emma")]
    assert Engine(model).generate([ids], max_new_tokens=4) == [text]


def test_a_tokenizer_is_found_by_the_size_of_the_vocabulary() -> None:
    assert Engine(build_model(preset("tiny-llama"), seed=0)).tokenizer is not None
    assert Engine(model_of("gqa")).tokenizer is None


def test_no_prompts_give_no_texts() -> None:
    assert Engine(model_of("gqa")).generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ("abc", {}, "must be a list of prompts, got the text 'abc'"),
        ([[]], {}, "must hold at least one"),
        ([[40]], {}, r"from 0 to 39, got \[40\]"),
        ([[-1]], {}, r"from 0 to 39, got \[-1\]"),
        (["abc"], {}, "text needs a tokenizer, and none came"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"max_new_tokens": 64}, "do not fit in the model's context of 64"),
        ([[1]], {"stop": ["x"]}, "stop strings need a tokenizer"),
        ([[1]], {"stop": "x"}, "stop must be a list"),
        ([[1]], {"stop": [""]}, "must not be empty"),
        ([[1]], {"temperature": -1}, "temperature must be at least 0"),
        ([[1]], {"top_logprobs": 21}, "top_logprobs must be from 0 to 20, got 21"),
        (
            [[1]],
            {"logit_bias": {40: 1.0}, "max_new_tokens": 1},
            "logit_bias must name ids from 0 to 39, got 40",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Engine(model_of("gqa")).generate(prompts, **options)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1024 ids and the model only 40"):
        Engine(model_of("gqa"), TOKENIZER)


def test_generating_leaves_no_gradient_and_no_change() -> None:
    model = model_of("mla")
    before = {name: p.clone() for name, p in model.named_parameters()}
    Engine(model).generate(PROMPTS, max_new_tokens=3)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


def test_each_prompt_may_have_its_own_seed() -> None:
    engine, draw = Engine(model_of("gqa")), {"max_new_tokens": 12, "temperature": 1.0}
    together = engine.generate(PROMPTS, seed=[5, 7, 5], **draw)
    for prompt, seed, got in zip(PROMPTS, [5, 7, 5], together, strict=True):
        assert engine.generate([prompt], seed=seed, **draw) == [got]
    with pytest.raises(ValueError, match="one for each of 3 prompts, got 2"):
        engine.generate(PROMPTS, seed=[1, 2])


def test_a_penalty_counts_what_is_generated() -> None:
    got = say([*[TOKENIZER.encode("!")[0]] * 4], max_new_tokens=4, frequency_penalty=3.0)
    assert got.text == "!!?!"  # 9 and 6 against 5, 3 against 5, 3 against 2


def test_a_repetition_penalty_knows_the_prompt() -> None:
    mark, other = TOKENIZER.encode("!")[0], TOKENIZER.encode("?")[0]
    model = Scripted([mark, mark])
    engine = Engine(model, TOKENIZER)  # pyright: ignore
    (got,) = engine.generate([[mark]], max_new_tokens=2, repetition_penalty=2.5)
    assert got.tokens == [other, mark]  # 9 / 2.5 < 5; then both are known


def test_log_probabilities_come_with_each_token_and_do_not_see_the_settings() -> None:
    model = model_of("mla")
    (plain,) = Engine(model).generate([[1, 2]], max_new_tokens=4)
    (got,) = Engine(model).generate([[1, 2]], max_new_tokens=4, top_logprobs=3)
    assert plain.logprobs is None
    assert got.logprobs is not None
    assert got.tokens == plain.tokens == [one.token_id for one in got.logprobs]
    for place, one in enumerate(got.logprobs):
        ids = torch.tensor([[1, 2, *got.tokens[:place]]])
        want = model(ids)[0, -1].log_softmax(-1)
        assert one.logprob == pytest.approx(want[one.token_id].item(), abs=1e-4)
        assert [i for i, _ in one.top] == want.topk(3).indices.tolist()
    (cold,) = Engine(model).generate(
        [[1, 2]], max_new_tokens=1, top_logprobs=0, temperature=0.1, logit_bias={7: 100.0}
    )
    assert cold.logprobs is not None
    assert cold.logprobs[0].logprob == pytest.approx(
        model(torch.tensor([[1, 2]]))[0, -1].log_softmax(-1)[7].item(), abs=1e-4
    )


def test_a_request_goes_before_the_engine_and_that_before_the_checkpoint() -> None:
    model = model_of("gqa")
    stored = Settings(max_new_tokens=3, temperature=1.0, eos_ids=(1,))
    said = b'{"max_new_tokens": 3, "do_sample": true}'
    origin = SimpleNamespace(files={"generation_config.json": said}, config={"eos_token_id": 1})
    object.__setattr__(model, "origin", origin)
    line = Settings(max_new_tokens=5)
    assert Engine(model).defaults == stored
    assert Engine(model, defaults=line).defaults == {**stored, **line}
    barred = {1: -100.0}
    lengths = [
        len(engine.generate([[2]], logit_bias=barred, max_new_tokens=asked)[0].tokens)
        for engine in (Engine(model), Engine(model, defaults=line))
        for asked in (None, 7)
    ]
    assert lengths == [3, 7, 5, 7]


def test_any_of_several_end_ids_ends_a_text() -> None:
    words = TOKENIZER.encode("so it is")
    for end in (TOKENIZER.encode("!")[0], TOKENIZER.encode(";")[0]):
        model = Scripted([*words, end, *words])
        ends = Settings(eos_ids=(*TOKENIZER.encode("!"), *TOKENIZER.encode(";")))
        (got,) = Engine(model, TOKENIZER, ends).generate(["a"])  # pyright: ignore
        assert (got.text, got.tokens[-1], got.finish_reason) == ("so it is", end, "eos")


@pytest.mark.gpu
def test_a_gpu_writes_what_the_cpu_writes() -> None:
    for name in ("tiny-gqa", "tiny-deepseek"):
        model = build_model(replace(preset(name), init_std=0.1), seed=4)
        ask = {"max_new_tokens": 12, "stop": ["e"]}
        prompts = ["A word", "", "the end of the"]
        on_cpu = Engine(model).generate(prompts, **ask)
        assert Engine(model.cuda()).generate(prompts, **ask) == on_cpu
        drawn = Engine(model).generate(prompts, temperature=1.0, seed=1, **ask)
        assert Engine(model).generate(prompts, temperature=1.0, seed=1, **ask) == drawn


def test_another_projects_model_does_not_get_our_tokenizer() -> None:
    model = fathom.build("tiny-llama")
    assert tokenizer_of(model) is not None
    object.__setattr__(model, "origin", Origin())
    assert tokenizer_of(model) is None
