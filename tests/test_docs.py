"""The documentation: it builds, every link leads somewhere, and every block in it is run.

A fenced block says what it is: ``python``; ``bash``, of fathom's verbs; ``bash slow``, which only
has to parse, but in slow tests; ``toml`` with the class that must take it; ``text output`` of the
block before; ``text equation`` or ``text layout``, for people. Anything else fails here.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

import fathom
from fathom import cli, settings
from fathom.attention import ATTENTION
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.console import UsageError
from fathom.ffn import FFNS
from fathom.ladder.plan import plan
from fathom.ladder.study import Study, load_study
from fathom.train.config import read_run_config
from small_corpus import small_corpus

ROOT = Path(__file__).parents[1]
PAGES = {p.relative_to(ROOT).as_posix(): p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
BUILT_AS = {"demo-cpu": "demo", "facts-cpu": "facts", "sparse-cpu": "sparse"}  # record: study
RUN_WHEN_SLOW = ("docs/ladder.md", "docs/your-own-attention.md")
DENSE = {"kind": "dense", "inter_dim": 8}
MHA = {"kind": "mha", "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "position": {"kind": "rope"}}
RECORD = {
    "study": "demo",
    "title": "Two steps",
    "question": "Do they pay?",
    "budget": {"sentence": "Every arm is trained on the same 10 tokens."},
    "margin": 0.01,
    "env": {"device": "cpu", "cores": "2", "torch": "2.13.0"},
    "anchors": {"xz": {"mean": 2.5, "by_domain": {}}, "order2": {"mean": 2.25, "by_domain": {}}},
    "lr_note": "No arm was tuned.",
    "commands": ["fathom ladder demo"],
    "arms": [
        {
            "name": "mha",
            "parent": None,
            "val_bpb": {"mean": 2.125, "std": 0.0025, "n": 3},
            "params": 1115264,
            "cache_bytes_per_token": 2048,
        },
        {
            "name": "mla",
            "parent": "mha",
            "claim": "Does it pay?",
            "val_bpb": {"mean": 2.1, "std": 0.003, "n": 3},
            "params": 1123712,
            "cache_bytes_per_token": 640,
            "verdict": {
                "verdict": "better",
                "delta_bpb": -0.025,
                "interval": [-0.03, -0.02],
                "sentence": "better: 0.0250 bits per byte lower than mha",
            },
        },
        {"name": "moe", "parent": "mla", "claim": "Or this?", "failed": "seed 2: NaN | at step 3"},
    ],
}


def script(name: str) -> ModuleType:
    """A program of ``docs/`` as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


build, results = script("build"), script("results")


def tokens_of(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def spans(path: Path) -> list[str]:
    """Every piece of code inside a sentence."""
    inline = [child for token in tokens_of(path) for child in token.children or []]
    return [child.content for child in inline if child.type == "code_inline"]


# --- The site --------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkout with two pages and one source file."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "part.py").write_text(
        "SIZE = 3\n\n\n@final\nclass Part:\n\n    def run(self):\n        return 1\n"
    )
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n## Menu\n\n- [One](one.md#a-b)\n")
    write_page(tmp_path, "## A, b!\n")
    return tmp_path


def write_page(root: Path, text: str) -> None:
    (root / "docs" / "one.md").write_text(f"# One\n\n{text}")


def test_the_documentation_has_no_broken_link_and_no_page_outside_the_menu() -> None:
    assert build.read_site().problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("## A b\n\n[x](two.md)", "docs/one.md:5: two.md: there is no such file"),
        ("## A b\n\n[x](#c)", "docs/one.md:5: #c: there is no such heading"),
        ("no heading", "docs/index.md:5: one.md#a-b: there is no such heading"),
        ("## A b\n\n![x](../a.png)", "docs/one.md:5: ../a.png: there is no such file"),
        ('## A b\n\n[`Gone`](../src/part.py "code")', "docs/one.md:5: part.py has no Gone"),
        ('## A b\n\n[`X`](../src/no.py "code")', "there is no"),
    ],
)
def test_what_leads_nowhere_is_named_with_its_line(small, text, problem):
    write_page(small, text)
    (found,) = build.read_site(small).problems
    assert problem in found


def test_a_page_that_the_menu_lacks_is_a_problem(small):
    (small / "docs" / "lost.md").write_text("# Lost\n")
    assert build.read_site(small).problems == ["docs/index.md: does not link to lost.md"]


def test_the_markdown_beside_the_code_is_checked_too(small):
    (small / "README.md").write_text("[x](docs/one.md#none)")
    (found,) = build.read_site(small).problems
    assert found.startswith("README.md:1: docs/one.md#none")


def test_a_link_alone_expands_to_the_source_of_its_names(small):
    write_page(small, '## A b\n\n[`Part.run` `SIZE`](../src/part.py "code")\n')
    site = build.read_site(small)
    (fence,) = [t for t in site.pages[small / "docs/one.md"].tokens if t.type == "fence"]
    assert fence.content == "def run(self):\n    return 1\n\nSIZE = 3\n"


def test_a_class_is_shown_with_its_decorators(small):
    assert build.source_of(small / "src/part.py", ["Part"]).startswith("@final\nclass Part:")


def test_an_outline_ends_with_the_docstring() -> None:
    shown = build.source_of(ROOT / "src/fathom/model/mtp.py", ["targets_ahead"], outline=True)
    first, second = shown.splitlines()
    assert (
        first
        == "def targets_ahead(targets_BT: Tensor, positions_BT: Tensor, depth: int) -> Tensor:"
    )
    assert second.strip().startswith('"""')


def test_every_public_function_has_its_place_on_the_page_of_the_api() -> None:
    named = set(spans(ROOT / "docs" / "api.md"))
    shown = {name for span in named for name in (span, span.removeprefix("fathom."))}
    assert [name for name in fathom.__all__ if name not in shown] == []


def test_shown_code_is_the_codes_own_text() -> None:
    shown = build.source_of(ROOT / "src/fathom/attention/mla.py", ["MLA.absorbed"])
    text = (ROOT / "src/fathom/attention/mla.py").read_text()
    assert all(line.strip() in text for line in shown.splitlines())
    assert shown.startswith("def absorbed(")


def test_a_link_inside_a_sentence_stays_a_link(small):
    write_page(small, '## A b\n\nSee [`Part`](../src/part.py "code").\n')
    site = build.read_site(small)
    assert all(token.type != "fence" for token in site.pages[small / "docs/one.md"].tokens)


def test_headings_that_repeat_get_anchors_of_their_own(small):
    write_page(small, "## A b\n\n## A b\n\n[second](#a-b-1)\n")
    assert build.read_site(small).problems == []


def recorded(root: Path, name: str = "demo-cpu") -> Path:
    folder = root / "studies" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RECORD))
    return folder


def test_without_a_record_a_page_says_so(tmp_path):
    assert "not been recorded" in build.verdicts(tmp_path, ["mla"])


def test_with_a_record_a_page_says_what_was_measured(tmp_path):
    said = build.verdicts(recorded(tmp_path), ["mha", "mla", "moe"])
    assert "- **mha** The arm that the study starts from, at 2.1250 bits per byte." in said
    assert "- **mla** *Does it pay?* Better: 0.0250 bits per byte lower than mha." in said
    assert "- **moe** *Or this?* Failed: seed 2: NaN" in said
    assert "same 10 tokens" in said


def test_an_arm_that_the_record_lacks_is_a_problem(tmp_path):
    with pytest.raises(ValueError, match="demo has no arm gqa"):
        build.verdicts(recorded(tmp_path), ["gqa"])


def test_pages_ask_for_arms_that_the_study_has() -> None:
    asked = re.compile(r'^\[([^\]]+)\]\(\.\./studies/([\w-]+)/\S+ "verdict"\)$', re.MULTILINE)
    found = [match for path in PAGES.values() for match in asked.findall(path.read_text())]
    assert len(found) > 10
    for names, record in found:
        known = {arm.name for arm in load_study(BUILT_AS.get(record, record)).arms}
        assert {name.strip() for name in names.split(",")} <= known


class Links(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.ids: list[str] = []
        self.viewport = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.viewport |= found.get("name") == "viewport"
        self.ids += [value for value in [found.get("id")] if value]
        href = found.get("href") or found.get("src")
        if href:
            (self.leads if tag == "a" else self.loads).append(href)


def read_html(path: Path) -> Links:
    parser = Links()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def test_the_site_is_whole_and_asks_nothing_of_a_network(tmp_path):
    build.main(["--out", str(tmp_path)])
    pages = {path.name: read_html(path) for path in tmp_path.glob("*.html")}
    assert len(pages) == len(list(ROOT.glob("docs/*.md")))
    for page in pages.values():
        assert page.viewport
        assert len(set(page.ids)) == len(page.ids)
        assert "style.css" in page.loads
        assert all((tmp_path / href).is_file() for href in page.loads)
        for href in page.leads:
            name, _, anchor = href.partition("#")
            if re.match(r"https?:", name):
                continue
            assert not name or (tmp_path / name).exists(), href
            target = page if not name else pages.get(name)
            assert not anchor or (target is not None and anchor in target.ids), href


def test_the_check_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build.main(["--check", "--out", str(tmp_path / "site")])
    assert "every link leads somewhere" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_problem_ends_the_build_with_its_line(small, monkeypatch, tmp_path):
    write_page(small, "none")
    monkeypatch.setattr(build, "read_site", lambda read=build.read_site: read(small))
    with pytest.raises(SystemExit, match="no such heading"):
        build.main(["--out", str(tmp_path / "site")])
    assert not (tmp_path / "site").exists()


# --- The results in the README ---------------------------------------------------------------


def test_the_readme_and_the_claims_hold_what_the_records_say() -> None:
    for path, filled in ((results.README, results.in_readme), (results.PAGE, results.in_page)):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert filled(ROOT, text) == text, "python docs/results.py --write"


def test_a_record_shown_whole_is_a_table_with_a_row_for_every_arm(tmp_path):
    (recorded(tmp_path) / "forest.png").touch()
    text = results.whole(tmp_path, "demo-cpu")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2:] == [
        "| mha |  | 2.1250 ± 0.0025 |  |  | 1,115,264 | 2,048 |",
        "| mla | mha | 2.1000 ± 0.0030 | -0.0250 (-0.0300 to -0.0200) | **better** "
        "| 1,123,712 | 640 |",
        "| moe | mla |  |  | failed: seed 2: NaN / at step 3 |  |  |",
    ]
    assert "3 seeds an arm. Measured on: device cpu, cores 2, torch 2.13.0." in text
    assert "`xz -9e` 2.500, counting byte triples 2.250" in text
    assert "(../studies/demo-cpu/forest.png)" in text
    assert "No arm was tuned." in text


def test_the_page_has_the_answers_of_every_record_and_the_readme_those_of_the_first(tmp_path):
    first, second = (recorded(tmp_path, name) for name in ("demo-cpu", "again"))
    page = "<!-- verdicts later, again, demo-cpu: mla, moe -->\n<!-- end -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "claims.md").write_text(page)
    answer = "| Does it pay? | **better** | mla against mha: -0.0250 (-0.0300 to -0.0200) |"
    said = results.in_page(tmp_path, page)
    assert said.count(answer) == 2
    assert said.count("| failed: seed 2: NaN / at step 3 | moe against mla |") == 2
    assert "Not recorded here: `later`." in said
    assert results.in_page(tmp_path, said) == said
    (row,) = [row for row in results.results(tmp_path).splitlines() if row.startswith(answer)]
    assert f"studies/{second.name}/" in row
    assert f"studies/{first.name}/" not in row


def test_every_arm_that_a_claim_asks_for_is_in_one_of_its_studies() -> None:
    for _, kind, asked, _ in results.BLOCK.findall((ROOT / results.PAGE).read_text()):
        if kind == "verdicts":
            names, wanted = (part.split(", ") for part in asked.split(": "))
            known = {
                arm.name for name in names for arm in load_study(BUILT_AS.get(name, name)).arms
            }
            assert set(wanted) <= known


def test_every_figure_among_the_claims_is_in_a_record() -> None:
    """All but what others published, which stands in quotations with its source."""
    files = ROOT.glob("studies/*/results.json")
    known = [number for path in files for number in figures_of(json.loads(path.read_text()))]
    own = results.BLOCK.sub("", (ROOT / results.PAGE).read_text(encoding="utf-8"))
    own = re.sub(r"^>.*$|\]\([^)]*\)|`[^`]*`", "", own, flags=re.MULTILINE)
    for figure in re.findall(r"\d+\.\d+|\d+(?= %)", own):
        digits = len(figure.partition(".")[2])
        assert float(figure) in {round(abs(number), digits) for number in known}, figure


def figures_of(data: object) -> Iterator[float]:
    """The numbers of a record: as they are, in per cent, in millions; of lists the short ones."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key not in ("seeds", "curves"):
                yield from figures_of(value)
    elif isinstance(data, list):
        for item in data if len(data) < 20 or isinstance(data[0], dict) else ():
            yield from figures_of(item)
    elif isinstance(data, int | float):
        yield from (data, 100 * data, data / 1e6)


def test_without_a_record_the_readme_says_how_to_make_one(tmp_path):
    assert "`make demo`" in results.results(tmp_path)


def test_printing_results_leaves_the_readme_alone(capsys):
    before = (ROOT / "README.md").read_bytes()
    results.main([])
    assert capsys.readouterr().out.strip() == results.results(ROOT)
    assert (ROOT / "README.md").read_bytes() == before


# --- What the pages name ---------------------------------------------------------------------


def verbs(command: Any, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every verb with its options."""
    for name, inner in getattr(command, "commands", {}).items():
        yield f"{prefix}{name}", {option for param in inner.params for option in param.opts}
        yield from verbs(inner, f"{prefix}{name} ")


def test_every_verb_and_option_that_a_page_names_exists() -> None:
    root = typer.main.get_command(cli.app)
    known = dict(verbs(root))
    every = {option for options in known.values() for option in options}
    every |= {option for param in root.params for option in param.opts}
    every |= {"--help", "--debug", "--train.lr"}  # any config key is an option
    for page, path in PAGES.items():
        for span in spans(path):
            words = span.split()
            if words[:1] == ["fathom"] and len(words) > 1 and not words[1].startswith("-"):
                verb = " ".join(words[1:3]) if words[1] == "data" else words[1]
                assert verb in known, f"{page}: {span}"
            options = [word for word in words if re.match(r"--[a-z]", word)]
            if words[:1] in (["fathom"], options[:1]):
                assert set(options) <= every, f"{page}: {span}"


def test_every_verb_is_in_the_readme() -> None:
    known = dict(verbs(typer.main.get_command(cli.app))).keys() - {"data"}  # a group of verbs
    named = " ".join(f"{span} " for span in spans(ROOT / "README.md"))
    assert [verb for verb in sorted(known) if f"fathom {verb} " not in named] == []


def test_every_message_in_the_faq_is_one_that_the_code_can_say() -> None:
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    text = (ROOT / "docs" / "faq.md").read_text()
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) > 10
    assert [message for message in messages if message not in code] == []


# --- The blocks ------------------------------------------------------------------------------


def parse_part(**part: Any) -> LayerGroup:
    return settings.parse(LayerGroup, {"count": 1, "attention": MHA, "ffn": DENSE, **part})


TOML: dict[str, Callable[[dict[str, Any]], object]] = {
    "run": read_run_config,
    "study": lambda data: plan(settings.parse(Study, data)),
    "model": lambda data: settings.parse(ModelConfig, data),
    "attention": lambda data: parse_part(attention=data),
    "ffn": lambda data: parse_part(ffn=data),
    "mtp": lambda data: settings.parse(MTPConfig, data),
}
TINY = {  # what makes a command cheap
    "train": "train.steps=2 train.warmup_steps=0 train.tokens_per_step=64 data.seq_len=32 "
    "train.eval_bytes=200",
    "generate": "--max-new-tokens 3",
    "eval": "--max-bytes 200 --seq-len 32",
    "ladder": "--jobs 0 budget.value=128 train.tokens_per_step=32 train.warmup_steps=1 "
    "data.seq_len=32 data.source=corpus",
}


class Blocks:
    """Runs the blocks of one page in their order, in one namespace and one folder."""

    def __init__(self, *, slow: bool) -> None:
        self.slow = slow
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.output = ""

    def run(self, info: str, text: str) -> None:
        language, _, rest = info.partition(" ")
        match language, rest:
            case "python", "":
                self.output = printed(lambda: exec(compile(text, "page", "exec"), self.namespace))
            case "bash", "" | "slow":
                commands = [shlex.split(line, comments=True) for line in text.splitlines()]
                run = rest == "" or self.slow
                self.output = printed(lambda: [command(words, run=run) for words in commands])
            case "toml", kind if kind in TOML:
                TOML[kind](tomllib.loads(text))
                if kind == "study":
                    Path("study.toml").write_text(text)
            case "text", "output":
                pattern = re.escape(text).replace(re.escape("...\n"), r"(.*\n)*")
                assert re.fullmatch(pattern, self.output), self.output
            case "text", "equation" | "layout":
                assert all(len(line) <= 120 for line in text.splitlines())
            case _:
                raise AssertionError(f"a block of {info!r} is nothing that can be checked")


def printed(run: Callable[[], object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run()
    return out.getvalue()


def command(words: list[str], *, run: bool) -> None:
    """Run a command of the pages, or see that it could be run."""
    if not words:
        return
    program, *args = words
    match program.removeprefix(".venv/bin/"):
        case "fathom":
            run_fathom(args) if run else parse_fathom(args)
        case "make":
            assert not run, "a target of the Makefile takes too long: mark the block slow"
            targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(args) <= set(targets), args
        case "python":
            assert not run
            assert args[:3] == ["-m", "pip", "install"], args
            assert args[-2:] == ["-e", "."], args
            assert "-c" not in args or (ROOT / args[args.index("-c") + 1]).is_file()
        case _:
            raise AssertionError(f"{program} is no command that this test knows")


def run_fathom(args: list[str]) -> None:
    tiny = TINY.get(args[0], "").split() if "--list" not in args else []
    code = cli.main([*args, *tiny])
    assert code == 0, f"fathom {shlex.join(args)} ended with {code}"


def parse_fathom(args: list[str]) -> None:
    """The verb, its options and its arguments are right; of a ladder, the whole plan."""
    root: Any = typer.main.get_command(cli.app)
    seen: dict[str, Any] = {}
    leaf, words = root, [*args]
    while hasattr(leaf, "commands"):
        leaf = leaf.commands[words.pop(0)]
    leaf.callback = seen.update
    root.main(args, prog_name="fathom", standalone_mode=False)
    assert seen
    if args[0] == "ladder":
        plan(load_study(seen["study"], seen["settings"] or ()))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder with what a checkout has; what a page registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("benchmarks", "configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tables = [cast(dict[str, Any], table) for table in (ATTENTION, FFNS)]
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    settings.refresh()
    sys.modules.pop("own_attention", None)


def blocks(path: Path) -> list[Token]:
    return [token for token in tokens_of(path) if token.type == "fence"]


WITH_BLOCKS = [page for page, path in PAGES.items() if blocks(path)]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_every_block_of_a_page_runs(page):
    runner = Blocks(slow=False)
    for block in blocks(PAGES[page]):
        runner.run(block.info.strip(), block.content)


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", RUN_WHEN_SLOW)
def test_slow_blocks_run_too(page):
    small_corpus(Path())
    runner = Blocks(slow=True)
    for block in blocks(PAGES[page]):
        runner.run(block.info.strip(), block.content)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("info", "text"),
    [
        ("", "anything"),
        ("sh", "ls"),
        ("bash", "make demo"),
        ("bash", "rm -rf runs"),
        ("bash", "fathom sing"),
        ("bash slow", "make coffee"),
        ("bash slow", "fathom train --sing"),
        ("bash slow", "fathom ladder no-such-study"),
        ("toml", "a = 1"),
        ("toml run", "a = 1"),
        ("text output", "nothing printed this"),
        ("python", "assert 1 == 2"),
        ("python skip", "pass"),
    ],
)
def test_a_block_that_is_wrong_or_unknown_fails(info, text):
    with pytest.raises((AssertionError, ValueError, UsageError)):
        Blocks(slow=False).run(info, text)


def test_output_may_leave_lines_out_where_it_says_so() -> None:
    runner = Blocks(slow=False)
    runner.run("python", "print('a\\nb\\nc')")
    for shown in ("a\nb\nc\n", "a\n...\nc\n", "...\nc\n", "a\n...\n"):
        runner.run("text output", shown)
    with pytest.raises(AssertionError):
        runner.run("text output", "a\nc\n")
