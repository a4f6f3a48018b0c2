"""Running text out of HTML and roff (manual pages): enough for training text, no more."""

import re
from html.parser import HTMLParser

SKIPPED = frozenset(("head", "script", "style", "nav", "header", "aside", "button", "noscript"))
INLINE = frozenset(
    ("a", "abbr", "b", "cite", "code", "dfn", "em", "i", "kbd", "q", "samp", "small")
)
INLINE |= {"span", "strong", "sub", "sup", "tt", "u", "var"}
ROFF_FONT = re.compile(r"\\f(?:\(..|\[[^]]*\]|.)")
ROFF_SIZE = re.compile(r"\\s[+-]?\d")
ROFF_NAMED = {"aq": "'", "lq": "“", "rq": "”", "oq": "\u2018", "cq": "\u2019", "dq": '"', "bu": "•"}
ROFF_NAMED |= {
    "en": "\u2013",
    "em": "—",
    "co": "©",
    "rg": "®",
    "ha": "^",
    "ti": "~",
    "mi": "\u2212",
}
ROFF_KEPT = re.compile(
    r"^\.\s*(?:SH|SS|B|I|R|SM|SB|BR|RB|BI|IB|IR|RI|IP|TP|Nm|Nd|Sh|Ss|It|Ar|Fl)\b *"
)


class _Text(HTMLParser):
    """Collects what is outside the skipped elements; a block element begins a line.

    Line ends inside a text are spaces, except within ``pre``.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in SKIPPED
        self._preformatted += tag == "pre"
        if tag not in INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in SKIPPED and self._skipping > 0
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag not in INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._preformatted else data.replace("\n", " "))


def html_text(html: str) -> str:
    """The text of a page, one line a block, without scripts and navigation."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


def roff_text(page: str) -> str:
    """The text of a manual page: requests dropped, the words of headings and fonts kept."""
    lines = []
    for line in page.split("\n"):
        if line.startswith((".", "'")):
            kept = ROFF_KEPT.match(line)
            if not kept:
                continue
            line = line[kept.end() :].replace('"', "")
        lines.append(_roff_unescaped(line).strip())
    return "\n".join(line for line in lines if line) + "\n"


def _roff_unescaped(line: str) -> str:
    line = ROFF_SIZE.sub("", ROFF_FONT.sub("", re.sub(r'\\".*', "", line)))
    line = re.sub(r"\\\((..)|\\\[(\w+)\]", _named, line)
    line = line.replace("\\e", "\0").replace("\\-", "-").replace("\\~", " ").replace("\\ ", " ")
    return re.sub(r"\\[&,/|^:%!]?", "", line).replace("\0", "\\")


def _named(match: re.Match[str]) -> str:
    return ROFF_NAMED.get(match[1] or match[2], "")
