"""The report is one page that needs nothing else and says all that results.json holds."""

import base64
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from fathom.ladder import charts, curves, readings, tables
from fathom.ladder.recorded import read_study
from fathom.ladder.report import PICTURE_WIDTHS, main_charts, vega_bundle, write_pictures
from fathom.ladder.report import write_report as draw

DOMAINS = {"prose": 2.35, "code": 1.72, "chinese": 3.05, "math": 2.10}
NAN_REASON = "seed 2: the loss became NaN at step 112: lower train.lr"
ARMS = [  # name, parent, claim, difference to the parent, verdict
    ("mha", None, "", 0.0, None),
    ("gqa", "mha", "Do 2 shared key-value heads do as well as 8?", 0.003, "same"),
    ("mqa", "gqa", "Is a single key-value head enough?", 0.016, "worse"),
    ("shared-query", "mha", "Is it the many queries that matter?", 0.041, "worse"),
    ("mla", "gqa", "Does one latent per token do as well as shared heads?", -0.004, "unsure"),
    ("no-position", "mha", "Can the model do without position?", 0.058, "worse"),
    ("alibi", "mha", "Will a bias on the score do in place of rotation?", -0.0012, "same"),
    ("decoupled-rope", "mha", "Need position rotate the content at all?", 0.006, "unsure"),
    ("moe-coarse", "mla", "Do a few experts beat a dense FFN at equal compute?", -0.031, "better"),
    ("moe-fine", "moe-coarse", "Do many small experts beat a few large?", -0.022, "better"),
    ("dense-wide", "mla", "Is a dense FFN of the experts' size better?", None, None),
    ("moe-aux", "moe-fine", "Does an auxiliary loss even the load for free?", 0.004, "unsure"),
    ("moe-loss-free", "moe-fine", "Does a bias even it for less?", -0.0008, "same"),
    ("mtp", "moe-loss-free", "Does predicting two tokens teach more?", 0.012, "worse"),
]
CACHE = {"mha": 2048, "shared-query": 2048, "no-position": 2048, "alibi": 2048, "gqa": 512}
CACHE |= {"mqa": 256, "decoupled-rope": 2304}
FLOPS = {"mqa": 2.5e6, "shared-query": 2.47e6, "mla": 2.61e6, "decoupled-rope": 2.58e6}


def results() -> dict[str, Any]:
    """A study of fourteen arms in the shape that ``fathom ladder`` writes, one of them failed."""
    rng = random.Random(0)
    means = {None: 2.305}
    arms = []
    for name, parent, claim, gap, word in ARMS:
        means[name] = means[parent] + (gap or 0.0)
        arms.append(_arm(rng, name, parent, claim, gap, word, means[name]))
    heldout = {"kind": "text", "train_tokens": 1_200_000, "heldout_bytes": 61_000}
    anchor = {"xz": (2.713, (2.9, 2.0, 3.4, 2.55)), "order2": (2.402, (2.5, 1.9, 3.1, 2.11))}
    return {
        "study": "demo",
        "title": "From Llama to DeepSeek on two CPU cores",
        "question": "Which steps pay off at a budget of 400,000 tokens, and which are noise?",
        "budget": {
            "hold": "tokens",
            "value": 400000.0,
            "sentence": "Every arm is trained on the same 400,000 tokens.",
        },
        "data": {
            "source": "bundled",
            "fingerprint": "5f0c9b1de17a44c0",
            "domains": dict.fromkeys(DOMAINS, heldout) | {"image": {"kind": "image"}},
        },
        "env": {"fathom": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 2},
        "margin": 0.01,
        "anchors": {
            name: {"mean": mean, "by_domain": dict(zip(DOMAINS, bits, strict=True))}
            for name, (mean, bits) in anchor.items()
        },
        "learned": {"sentence": "The best arm knows more than byte triples."},
        "commands": ["pip install fathom-lm==0.1.0", "fathom ladder demo --out runs/demo"],
        "lr_note": "Each arm's rate is the minimum of a parabola through five rates.",
        "lr": {"sweep": {name: _swept(means[name]) for name in ("mha", "gqa", "moe-fine")}},
        "arms": arms,
    }


def _arm(rng, name, parent, claim, gap, word, mean) -> dict[str, Any]:
    found = _differences(name, parent)
    about = {"name": name, "parent": parent, "claim": claim, "differences": found}
    about["differs"] = [item["key"] for item in found]
    if gap is None:
        empty = ("val_bpb", "params", "active_params", "flops_per_token", "cache_bytes_per_token")
        empty += ("train_tokens_per_second", "peak_memory_bytes", "lr", "verdict", "symbols")
        return {**about, **dict.fromkeys(empty), "seeds": [], "probes": {}, "failed": NAN_REASON}
    offsets = {d: bpb - 2.305 + rng.gauss(0, 0.01) for d, bpb in DOMAINS.items()}
    scores = [mean + rng.gauss(0, 0.003) for _ in range(3)]
    experts = "moe" in name or name == "mtp"
    width = 0.004 if word in ("same", "better") else 0.009
    return {
        **about,
        "seeds": [{"seed": seed, "val_bpb": bpb, "lr": 6e-3} for seed, bpb in enumerate(scores)],
        "val_bpb": {
            "mean": mean,
            "std": 0.003,
            "n": 3,
            "by_domain": {d: mean + offset for d, offset in offsets.items()},
        },
        "symbols": {"image": 1.83 + rng.gauss(0, 0.02)},
        "params": 3.12e6 if experts else 1.46e6,
        "active_params": 1.48e6,
        "flops_per_token": FLOPS.get(name, 2.64e6 if experts else 2.49e6),
        "cache_bytes_per_token": CACHE.get(name, 320),
        "train_tokens_per_second": rng.uniform(9e3, 2.1e4),
        "peak_memory_bytes": 2.31e8,
        "lr": 4e-3 if experts else 6e-3,
        "curves": [{"seed": seed, **_curve(rng, bpb)} for seed, bpb in enumerate(scores)],
        "evaluation_interval": [mean - 0.021, mean + 0.022],
        "probes": _probes(rng, name, mean) | ({"routing": _experts(rng, name)} if experts else {}),
        "verdict": word
        and {
            "verdict": word,
            "delta_bpb": gap,
            "interval": [gap - width, gap + width],
            "sentence": f"{name} is {word}: {gap:+.4f} bits per byte against {parent}.",
        },
        "failed": None,
    }


def _swept(mean: float) -> dict[str, Any]:
    rates = (0.001, 0.002, 0.004, 0.008, 0.016)
    return {"points": [[lr, mean + 0.04 * math.log(lr / 0.005) ** 2] for lr in rates]}


def _differences(name: str, parent: str | None) -> list[dict[str, Any]]:
    if parent is None:
        return []
    layers = "model.layers.*"
    rows = [{"key": f"{layers}.attention.kind", "parent": "mha", "arm": name, "mark": "named"}]
    if name in ("mqa", "mla"):
        rows.append({"key": f"{layers}.ffn.inter_dim", "parent": 512, "arm": 528, "mark": "fit"})
    if name == "mtp":
        rows.append({"key": "train.weight_decay", "parent": 0.1, "arm": None, "mark": "extra"})
    return rows


def _curve(rng, final: float) -> dict[str, list[float]]:
    tokens = [8192, 16384, 32768, *(32768 * k for k in range(2, 13))]
    return {"tokens": tokens, "bpb": [final * (393216 / t) ** 0.17 for t in tokens]}


def _probes(rng, name: str, mean: float) -> dict[str, Any]:
    context = [16, 64, 256, 1024, 4096]
    reach = [1 / n if name == "no-position" else 0.95**k for k, n in enumerate(context)]
    pairs = [2, 4, 8, 16, 32]
    speed: dict[str, float] = {"cache_bytes_per_token": CACHE.get(name, 320)}
    for form in ("_expanded", "_absorbed") if "mla" in name else ("",):
        speed[f"decode_tokens_per_second{form}"] = rng.uniform(300, 500)
    return {
        "domains": {"mean": mean, "by_domain": DOMAINS},
        "position": {
            "place": [0, 4, 8, 16, 32, 64],
            "bits_per_byte": [mean + 0.9 * math.exp(-k / 2) for k in range(6)],
        },
        "speed": speed,
        "reach": {"context": context, "accuracy": reach, "longest_wavelength": 47114.1},
        "score": {"layer": [0, 1, 2], "position_share": [0.3, rng.random(), 0.1], "mean": 0.2},
        "retrieval": {
            "pairs": pairs,
            "accuracy": [min(1.0, 1.4 / n + rng.random() / 9) for n in pairs],
            "chance": [1 / n for n in pairs],
            "repeat_bits_first": 5.2,
            "repeat_bits_second": 4.1,
        },
    }


def _experts(rng, name: str) -> dict[str, Any]:
    experts, spread = (4 if name == "moe-coarse" else 16), 0.05 if "free" in name else 0.5

    def shares() -> list[list[float]]:
        return [[max(0.0, rng.gauss(1, spread)) / experts for _ in range(experts)] for _ in "abc"]

    return {
        "load": shares(),
        "max_violation": 2 * spread,
        "dead_experts": 0,
        "entropy": 0.97,
        "divergence": rng.uniform(0.1, 0.3),
        "divergence_shuffled": 0.0031,
        "by_domain": {domain: shares() for domain in [*DOMAINS, "image"]},
    }


def save(folder: Path, data: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, text, scripts and specs."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.specs: dict[str, dict[str, Any]] = {}
        self.styles: list[str] = []
        self.text = ""
        self._inside: tuple[str, dict[str, str]] = ("", {})
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = (tag, {key: value or "" for key, value in attrs})
        self.tags.append(self._inside)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attrs = self._inside
        if tag == "style":
            self.styles.append(data)
        elif tag == "script" and attrs.get("type") == "application/json":
            self.specs[attrs["id"]] = json.loads(data)
        elif tag == "script":
            self.scripts.append(data)
        else:
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page_of(folder: Path, data: object) -> Page:
    return Page(draw(save(folder, data)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("demo"), results())


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page(draw(folder).read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_anywhere(page):
    for _, attrs in page.tags:
        assert not {"src", "srcset", "data", "poster", "background"} & attrs.keys()
        assert attrs.get("href", "#")[0] == "#" or attrs["href"] == "data:,"
    style = "".join(page.styles)
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in page.text


def test_the_policy_allows_exactly_the_pages_own_scripts(page):
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv"))
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts]
    assert len(hashes) == 2
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src ([^;]*);", policy)[1] == " ".join(f"'sha256-{h}'" for h in hashes)


def test_the_bundle_can_stand_in_a_script_element():
    assert "</script" not in vega_bundle()
    assert "<!--" not in vega_bundle()
    assert "\r" not in vega_bundle()  # HTML turns it into a newline, and the hash would not match


def test_a_report_is_small_and_drawn_the_same_twice(folder):
    first = draw(folder).read_bytes()
    assert draw(folder).read_bytes() == first
    assert len(first) < 1.5e6
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.json"]


def test_all_that_was_asked_and_found_is_on_the_page(page):
    data = results()
    for key in ("title", "question", "lr_note"):
        assert data[key] in page.words
    assert data["budget"]["sentence"] in page.words
    for arm in data["arms"]:
        assert arm["name"] in page.words
        assert arm["claim"] in page.words
        assert (arm["failed"] or "") in page.words
        if arm["verdict"]:
            assert arm["verdict"]["sentence"] in page.words
            assert tables.signed(arm["verdict"]["delta_bpb"]) in page.words
        for item in arm["differences"]:
            assert item["key"] in page.words
    for text in (*data["commands"][1:], "2.13.0", "5f0c9b1de17a44c0", "61 kB held out"):
        assert text in page.words


def test_the_answer_counts_the_steps_and_sets_the_best_arm_beside_its_anchors(folder):
    said = " ".join(tables.answer(read_study(folder)))
    assert said.startswith("Of 13 steps from an arm to its child: 2 better than the parent; 3 the")
    assert "4 worse; 3 unsure: these seeds cannot tell; 1 failed." in said
    assert "The best arm is moe-loss-free at 2.250 bits per byte ± 0.003 over 3 seeds" in said
    assert "0.055 below mha, where the ladder starts." in said
    assert "xz compresses the same held-out text to 2.713" in said
    assert "needs 2.402; the best arm is below it" in said


def test_the_answer_says_when_no_arm_beats_the_order_2_model(tmp_path):
    data = results()
    data["anchors"]["order2"]["mean"] = 2.2
    said = " ".join(tables.answer(read_study(save(tmp_path, data))))
    assert "needs 2.200; not even the best arm is below it" in said


def test_the_answer_says_when_nothing_beats_the_first_arm(tmp_path):
    data = results()
    data["arms"] = data["arms"][:3]
    said = " ".join(tables.answer(read_study(save(tmp_path, data))))
    assert "The best arm is mha" in said
    assert "where the ladder starts: no later arm is below it." in said


def test_verdicts_are_words_and_symbols_not_colour_alone(page):
    for symbol, word in (("✓", "better"), ("=", "same"), ("✕", "worse"), ("?", "unsure")):
        assert f"{symbol} {word}" in page.words
    assert "! failed" in page.words


def test_a_difference_that_nothing_accounts_for_is_flagged(page):
    assert "⚑ Differs from its parent in 1 more key than its change names." in page.words
    assert "⚑ extra train.weight_decay 0.1 absent" in page.words
    assert page.words.count("⚑ Differs") == 1


def test_the_page_has_the_structure_that_assistive_technology_needs(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("main", "h1", "nav", "title")] == [1, 1, 1, 1]
    assert all(cell.get("scope") for cell in page.all("th"))
    assert {label["for"] for label in page.all("label")} == {s["id"] for s in page.all("select")}
    targets = [a["href"][1:] for a in page.all("a")] + [
        s["aria-labelledby"] for s in page.all("section")
    ]
    assert set(targets) <= set(ids)
    boxes = [
        d for d in page.all("div") if d.get("class", "").split()[:1] in (["chart"], ["scroll"])
    ]
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    regions = [box["aria-label"] for box in boxes if box["role"] == "region"]
    assert len(regions) == len(set(regions))


def test_every_chart_is_vega_lite_that_draws_on_its_own(page):
    hosts = [div["data-spec"] for div in page.all("div") if "data-spec" in div]
    assert hosts == list(page.specs)
    assert len(hosts) == 5 + 2 * 5 + 1 + 4 + 1  # main, maps of five MoE arms, dots, probes, sweep
    for name, spec in page.specs.items():
        assert spec["description"]
        if name[-1] in "1234" or name.endswith("-4-0"):
            continue  # the same kind again
        fixed = {**spec, "width": 400} if spec.get("width") == "container" else spec
        assert vl_convert.vegalite_to_svg(fixed).startswith("<svg")


def test_the_forest_shows_every_judged_step_over_the_margin(folder):
    spec = charts.forest(read_study(folder))
    rows = {row["step"]: row for row in spec["data"]["values"]}
    assert list(rows)[:2] == ["gqa from mha", "mqa from gqa"]
    assert len(rows) == 12
    assert spec["layer"][0]["data"]["values"] == [{"low": -0.01, "high": 0.01}]
    assert rows["moe-fine from moe-coarse"]["high"] == pytest.approx(-0.018)


def test_pictures_are_png_files_of_twice_the_width(folder, tmp_path):
    written = write_pictures(folder, tmp_path / "new" / "pictures")
    assert [path.stem for path in written] == list(PICTURE_WIDTHS)
    for path in written:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(content[16:20]) >= 2 * PICTURE_WIDTHS[path.stem]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}\"'&"


def hostile(value: object) -> object:
    """The same study with every string made hostile, keys and verdicts excepted."""
    if isinstance(value, dict):
        return {k: v if k in ("verdict", "hold") and v and not isinstance(v, dict) else hostile(v)
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_whatever_files_say_is_text(tmp_path):
    data = hostile(results())
    assert isinstance(data, dict)
    data["env"][HOSTILE] = "x"
    data["data"]["domains"][HOSTILE] = {"kind": "text"}
    data["arms"][0]["probes"][HOSTILE] = {HOSTILE: 1.5, "n": [1, 2, 3], "y" + HOSTILE: [1, 2, 3]}
    data["arms"][0]["val_bpb"]["by_domain"][HOSTILE] = 2.0
    page = page_of(tmp_path, data)
    assert len(page.scripts) == 2
    assert not page.all("img")
    assert "mha" + HOSTILE in page.text
    assert "onerror" not in {key for _, attrs in page.tags for key in attrs}
    assert "49" not in re.findall(r"onerror=alert\(2\)>(\d+)", page.text)
    assert any(row["arm"] == "mha" + HOSTILE for row in page.specs["spec-curves"]["data"]["values"])


def only(*names: str) -> dict[str, Any]:
    data = results()
    data["arms"] = [arm for arm in data["arms"] if arm["name"] in names]
    return data


def test_one_arm_alone_makes_a_page_without_verdicts(tmp_path):
    page = page_of(tmp_path, only("mha"))
    assert "This study has one arm and so no step to judge. The best arm is mha" in page.words
    assert "spec-forest" not in page.specs
    assert "spec-loss-flops" in page.specs


def test_a_study_whose_arms_all_failed_says_why_and_draws_nothing(tmp_path):
    arms = [{"name": "a", "parent": None, "failed": "out of memory: lower train.micro_batch_size"}]
    arms.append({"name": "b", "parent": "a", "failed": True})
    page = page_of(tmp_path, {**results(), "arms": arms, "lr": None})
    assert "No arm finished, so there is nothing to compare." in page.words
    assert "Failed: out of memory: lower train.micro_batch_size" in page.words
    assert not page.specs


def test_forty_arms_with_long_names_and_long_curves_stay_below_three_megabytes(tmp_path):
    data = results()
    routing = next(arm for arm in data["arms"] if arm["name"] == "moe-fine")["probes"]["routing"]
    arms = data["arms"][:1]
    for index in range(39):
        arm = copy.deepcopy(data["arms"][1 + index % 8])
        arm["name"] = f"{arm['name']}-under-a-name-that-does-not-fit-anywhere-number-{index}"
        for curve in arm["curves"]:
            curve["tokens"] = list(range(1000, 1_001_000, 500))
            curve["bpb"] = [2.3 + 1 / (1 + k) for k in range(2000)]
        arm["probes"]["routing"] = routing
        arms.append(arm)
    path = draw(save(tmp_path, {**data, "arms": arms}))
    assert path.stat().st_size < 3e6
    assert "number-38" in path.read_text(encoding="utf-8")


def with_holes(value: object, state: list[int]) -> object:
    """Every second number NaN, null, infinite or a string."""
    if isinstance(value, dict):
        return {key: with_holes(item, state) for key, item in value.items()}
    if isinstance(value, list):
        return [with_holes(item, state) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        state[0] += 1
        return [math.nan, value, None, value, math.inf, value, "n/a", value][state[0] % 8]
    return value


@pytest.mark.parametrize("start", range(4))
def test_missing_and_impossible_numbers_leave_a_page_that_still_says_the_rest(start, tmp_path):
    page = page_of(tmp_path, with_holes(results(), [start]))
    for arm in results()["arms"]:
        assert arm["name"] in page.words
    assert not re.search(r"\b(nan|inf|None|null)\b", page.words)
    for spec in page.specs.values():
        json.dumps(spec, allow_nan=False)


@pytest.mark.parametrize("name", ["verdict", "probes", "curves", "seeds", "val_bpb", "differs"])
@pytest.mark.parametrize("value", [None, 3, "text", [], {}, [[1]], {"a": {"b": [None]}}], ids=repr)
def test_a_field_of_any_other_shape_is_no_obstacle(name, value, tmp_path):
    data = only("mha", "gqa", "mla")
    for arm in data["arms"]:
        arm[name] = value
    assert "gqa" in page_of(tmp_path, data).words


def test_an_unknown_probe_is_shown_with_its_numbers_and_lines(tmp_path):
    data = only("mha", "gqa")
    for arm in data["arms"]:
        arm["probes"] = {
            "new_thing": {"score": 0.125, "by_size": {"size": [1, 2, 3], "hits": [4, 5, 6]}}
        }
    page = page_of(tmp_path, data)
    assert "New thing" in page.words
    assert "0.1250" in page.words
    (spec,) = (spec for key, spec in page.specs.items() if key.startswith("spec-probe"))
    assert spec["data"]["values"][0] == {"arm": "mha", "x": [1, 2, 3], "y": [4, 5, 6]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[]", "lists no arms"),
        ("{}", "no arms"),
    ],
)
def test_a_folder_without_results_is_refused_in_one_sentence(content, said, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        draw(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_style_sheet_uses_only_colours_of_the_charts_table(page):
    style = "".join(page.styles)
    used = set(re.findall(r"var\(--(\w+)\)", style)) - {"tint", "s"}
    assert used <= set(charts.COLOURS)
    sheet = style.split("\n", 1)[1]
    assert not re.search(r"#[0-9a-f]{3,8}\b[^{]*;", sheet)


def test_main_charts_of_a_study_without_numbers_are_none(tmp_path):
    study = read_study(save(tmp_path, {"arms": [{"name": "a"}, {"name": "b", "parent": "a"}]}))
    assert set(main_charts(study).values()) == {None}
    assert curves.mean_curves(study) == {}
    assert readings.readings(study) == []


def browse(path: Path) -> Page:
    """The page after Chromium has drawn it, without any network."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9"]
    flags += ["--window-size=360,800", "--virtual-time-budget=60000", "--dump-dom"]
    call = [browser, *flags, path.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=200, check=True)
    return Page(done.stdout)


@pytest.mark.slow
def test_chromium_draws_every_chart_under_the_policy_with_the_network_off(page, folder):
    drawn = browse(draw(folder))
    assert drawn.all("html")[0]["data-drawn"] == "yes"
    assert len(drawn.all("svg")) == len(page.specs)
    assert "could not be drawn" not in drawn.words


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(theme, folder, tmp_path):
    axe = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
    if not axe.is_file():
        pytest.skip("needs axe-core: npm install axe-core, or its axe.min.js in AXE_CORE")
    html = draw(folder).read_text(encoding="utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    html = html.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">')
    run = """
      for (const part of document.querySelectorAll("details")) part.open = true;
      const wait = setInterval(async () => {
        if (!document.documentElement.dataset.drawn) return;
        clearInterval(wait);
        const { violations } = await axe.run();
        const found = violations.map((v) => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]);
        document.documentElement.dataset.axe = JSON.stringify(found);
      }, 50);"""
    scripts = f"<script>{axe.read_text(encoding='utf-8')}</script><script>{run}</script>"
    copied = tmp_path / "axe.html"
    copied.write_text(html.replace("</body>", f"{scripts}</body>"), encoding="utf-8")
    found = json.loads(browse(copied).all("html")[0]["data-axe"])
    assert [item for item in found if item[0] in ("serious", "critical")] == []
