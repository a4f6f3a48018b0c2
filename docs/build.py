"""Build the documentation: the Markdown of this folder as HTML in ``site/``, every link checked.

    python docs/build.py [--check] [--out DIR]

A link that stands alone in its paragraph expands, if its title says so; on a code host it is still
a link. The menu is the list of links in ``index.md``, which must name every page.

    [`MLA.absorbed`](../src/fathom/attention/mla.py "code")      the shipped source of that name
    [`build`](../src/fathom/api.py "api")                        its signature and docstring
    [mla, gqa](../studies/demo-cpu/results.json "verdict")       what the demo said of these arms
"""

import argparse
import ast
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_by_name
from pygments.util import ClassNotFound

from fathom.ladder.recorded import Arm, read_study

ROOT = Path(__file__).parents[1]
RECORD = Path("studies/demo-cpu")
UNRECORDED = "The demo has not been recorded in this checkout yet: `make demo` measures it."
CHECKED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")


class PageError(ValueError):
    """Something in a page that cannot be shown as it stands."""


@dataclass
class Page:
    """One Markdown file: its tokens, after expansion, and what may be linked to in it."""

    path: Path
    tokens: list[Token]
    title: str = ""
    anchors: set[str] = field(default_factory=set)

    @property
    def output(self) -> str:
        return f"{self.path.stem}.html"


@dataclass
class Site:
    """All pages of ``root/docs``; ``others`` are Markdown files that are checked, not built."""

    root: Path
    pages: dict[Path, Page] = field(default_factory=dict)
    others: dict[Path, Page] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def page(self, path: Path) -> Page | None:
        return self.pages.get(path) or self.others.get(path)

    def menu(self) -> list[tuple[str, list[Page]]]:
        """The sections of ``index.md`` and the pages they link to."""
        index = self.pages[self.root / "docs" / "index.md"]
        sections: list[tuple[str, list[Page]]] = []
        for token, following in zip(index.tokens, index.tokens[1:], strict=False):
            if token.type == "heading_open" and token.tag == "h2":
                sections.append((following.content, []))
            for href in _hrefs(token) if sections else ():
                page = self.pages.get(_target(index.path, href))
                if page is not None and all(page not in pages for _, pages in sections):
                    sections[-1][1].append(page)
        return [(title, pages) for title, pages in sections if pages]


def read_site(root: Path = ROOT) -> Site:
    """Read, expand and check everything; ``Site.problems`` holds a line for each that is wrong."""
    site = Site(root)
    for path in sorted((root / "docs").glob("*.md")):
        site.pages[path] = _read(site, path)
    for path in (root / name for name in CHECKED):
        if path.is_file():
            site.others[path] = _read(site, path)
    for page in (*site.pages.values(), *site.others.values()):
        site.problems += _link_problems(site, page)
    linked = [page for _, pages in site.menu() for page in pages]
    for path, page in site.pages.items():
        if page not in linked and path.name != "index.md":
            site.problems.append(f"docs/index.md: does not link to {path.name}")
    return site


def build(site: Site, out: Path) -> None:
    """Write every page, the style sheet, and the files of the repository that pages link to."""
    theme = Path(__file__).with_name("theme")
    loader = jinja2.FileSystemLoader(theme)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html.j2")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(theme / "style.css", out / "style.css")
    menu = site.menu()
    order = [site.pages[site.root / "docs" / "index.md"], *(p for _, pages in menu for p in pages)]
    for place, page in enumerate(order):
        _rewrite_links(site, page, out)
        text = template.render(
            page=page,
            menu=menu,
            body=Markup(_markdown().renderer.render(page.tokens, _markdown().options, {})),
            before=order[place - 1] if place else None,
            after=order[place + 1] if place + 1 < len(order) else None,
        )
        (out / page.output).write_text(text, encoding="utf-8", newline="\n")


# --- Reading ---------------------------------------------------------------------------------


def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"highlight": _highlight}).enable("table")


def _highlight(code: str, language: str, _: object) -> str:
    """Code with a class per kind of word; the style sheet has their colours."""
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = TextLexer()
    marked = highlight(code, lexer, HtmlFormatter(nowrap=True))
    return f'<pre tabindex="0"><code>{marked}</code></pre>'


def _read(site: Site, path: Path) -> Page:
    page = Page(path, [])
    tokens = _markdown().parse(path.read_text(encoding="utf-8"))
    at = 0
    while at < len(tokens):
        kind = _expansion(tokens, at)
        if kind is None:
            page.tokens.append(tokens[at])
            at += 1
            continue
        try:
            page.tokens += _expanded(site, path, tokens[at + 1], kind)
        except PageError as problem:
            site.problems.append(f"{_place(site, page, tokens[at + 1])}: {problem}")
        at += 3  # the paragraph, its inline content, its end
    _mark_headings(page)
    _wrap_tables(page)
    return page


def _expansion(tokens: Sequence[Token], at: int) -> object:
    """The title of a link that is all there is in a paragraph, if it is one that expands."""
    parts = (tokens[at + 1].children or []) if tokens[at].type == "paragraph_open" else []
    kinds = [part.type for part in parts]
    alone = kinds[:1] == ["link_open"] and kinds.index("link_close") == len(kinds) - 1
    title = parts[0].attrGet("title") if alone else None
    return title if title in ("code", "api", "verdict") else None


def _expanded(site: Site, path: Path, inline: Token, kind: object) -> list[Token]:
    link, *inner, _ = inline.children or []
    file = _target(path, str(link.attrGet("href")))
    if kind == "verdict":
        arms = [name.strip() for child in inner for name in child.content.split(",")]
        return _markdown().parse(verdicts(file.parent, arms))
    names = [child.content for child in inner if child.type == "code_inline"]
    where = file.relative_to(site.root).as_posix() if file.is_relative_to(site.root) else str(file)
    caption = Token("html_block", "", 0, content=f'<p class="source">{where}</p>\n')
    source = source_of(file, names, outline=kind == "api")
    return [caption, Token("fence", "code", 0, info="python", content=source)]


def source_of(file: Path, names: Sequence[str], *, outline: bool = False) -> str:
    """The source of classes, functions, methods (``Class.method``) or constants of a file.

    Args:
        outline: stop behind the docstring.

    Raises:
        PageError: no such file, or a name that is not in it.
    """
    if not file.is_file():
        raise PageError(f"there is no {file}")
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    parts = []
    for name in names:
        body: list[ast.stmt] = ast.parse(text).body
        node: ast.stmt | None = None
        for part in name.split("."):
            node = next((item for item in body if part in _names(item)), None)
            body = getattr(node, "body", [])
        if node is None:
            raise PageError(f"{file.name} has no {name}")
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in (node, *decorators))
        last = _docstring_end(node) if outline else node.end_lineno
        parts.append(textwrap.dedent("\n".join(lines[first - 1 : last])))
    return "\n\n".join(parts) + "\n"


def _docstring_end(node: ast.stmt) -> int | None:
    body: list[ast.stmt] = getattr(node, "body", [])
    has_docstring = isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    return body[0].end_lineno if has_docstring else node.end_lineno


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def verdicts(folder: Path, names: Sequence[str]) -> str:
    """What a recorded ladder says of these arms, as Markdown.

    Raises:
        PageError: there is a record, but no such arm in it.
    """
    if not (folder / "results.json").is_file():
        return UNRECORDED
    study = read_study(folder)
    lines = []
    for name in names:
        arm = study.arm(name)
        if arm is None:
            raise PageError(f"{study.name} has no arm {name}")
        lines.append(_verdict_line(arm))
    return "\n".join([*lines, "", study.budget])


def _verdict_line(arm: Arm) -> str:
    claim = f" *{arm.claim}*" if arm.claim else ""
    if arm.failed is not None:
        said = f"failed: {arm.failed}"
    elif arm.verdict is not None:
        said = arm.verdict.sentence
    elif arm.mean is not None:
        said = f"the arm that the study starts from, at {arm.mean:.4f} bits per byte"
    else:
        said = "not measured"
    return f"- **{arm.name}**{claim} {said[:1].upper()}{said[1:]}."


def _mark_headings(page: Page) -> None:
    """Give every heading an id, as code hosts do."""
    for token, inline in zip(page.tokens, page.tokens[1:], strict=False):
        if token.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or [])
        page.title = page.title or text
        slug = unique = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 0
        while unique in page.anchors:
            number += 1
            unique = f"{slug}-{number}"
        page.anchors.add(unique)
        token.attrSet("id", unique)


def _wrap_tables(page: Page) -> None:
    """Let a wide table scroll by itself, by keyboard too."""
    wrapped = []
    for token in page.tokens:
        if token.type == "table_open":
            opening = '<div class="scroll" role="region" aria-label="table" tabindex="0">\n'
            wrapped.append(Token("html_block", "", 0, content=opening))
        wrapped.append(token)
        if token.type == "table_close":
            wrapped.append(Token("html_block", "", 0, content="</div>\n"))
    page.tokens = wrapped


# --- Links -----------------------------------------------------------------------------------


def _links(token: Token) -> Iterator[tuple[Token, str]]:
    """The links and pictures of an inline token, and the attribute that says where to."""
    for child in token.children or []:
        if child.type == "link_open":
            yield child, "href"
        elif child.type == "image":
            yield child, "src"


def _hrefs(token: Token) -> list[str]:
    return [str(child.attrGet(name)) for child, name in _links(token)]


def _is_external(href: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:", href) is not None


def _target(path: Path, href: str) -> Path:
    """The file that a link means."""
    name = unquote(href.partition("#")[0])
    return Path(os.path.normpath(path.parent / name)) if name else path


def _place(site: Site, page: Page, token: Token) -> str:
    line = token.map[0] + 1 if token.map else 0
    return f"{page.path.relative_to(site.root).as_posix()}:{line}"


def _link_problems(site: Site, page: Page) -> Iterator[str]:
    """A sentence for every link of a page that leads nowhere."""
    for token in page.tokens:
        for href in _hrefs(token):
            if _is_external(href):
                continue
            target, anchor = _target(page.path, href), href.partition("#")[2]
            linked = site.page(target)
            if linked is None and not target.exists():
                yield f"{_place(site, page, token)}: {href}: there is no such file"
            elif linked is not None and anchor and anchor not in linked.anchors:
                yield f"{_place(site, page, token)}: {href}: there is no such heading"


def _rewrite_links(site: Site, page: Page, out: Path) -> None:
    """Links to pages become links to their HTML; other files of the repository are copied."""
    for token in page.tokens:
        for child, name in _links(token):
            href = str(child.attrGet(name))
            target, anchor = _target(page.path, href), href.partition("#")[2]
            if _is_external(href) or href.startswith("#"):
                continue
            if target in site.pages:
                child.attrSet(name, site.pages[target].output + (f"#{anchor}" if anchor else ""))
                continue
            inside = target.relative_to(site.root)
            if target.is_file():
                copied = out / "files" / inside
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(target, copied)
            child.attrSet(name, f"files/{inside.as_posix()}")


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the documentation and check its links.")
    parser.add_argument("--check", action="store_true", help="check, write nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    chosen = parser.parse_args(args)
    site = read_site()
    if site.problems:
        sys.exit("\n".join(site.problems))
    if chosen.check:
        print(f"{len(site.pages)} pages, every link leads somewhere")  # noqa: T201
        return
    build(site, chosen.out)
    print(f"wrote {len(site.pages)} pages: open {chosen.out / 'index.html'}")  # noqa: T201


if __name__ == "__main__":
    main()
