import pytest

from fathom.data.markup import html_text, roff_text

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p {x}</style></head>
<body><nav><p>menu</p></nav><h1>Of  <i>the</i>
heading</h1><p>One &amp; two &#228;<br>three<script>alert("no")</script>.</p>
<pre>a = 1
b = 2</pre><ul><li>first<li>second</ul><aside>no</aside></body></html>"""


def test_a_page_becomes_its_lines_without_navigation_and_scripts():
    assert html_text(PAGE) == "Of the heading\nOne & two ä\nthree\n.\na = 1\nb = 2\nfirst\nsecond\n"


@pytest.mark.parametrize("broken", ["", "<p", "</nav></nav>text", "<nav>open", "&#xffffffff;<b"])
def test_broken_markup_is_no_error(broken):
    assert html_text(broken).endswith("\n")


def test_a_stray_end_tag_does_not_hide_what_follows():
    assert html_text("</nav></head>text<nav>no</nav>more") == "text\nmore\n"


MAN = r""".\" a comment
'\" t
.TH LS 1 "September 2022"
.SH "SEE ALSO"
.PP
\fBls\fP [\fI\,OPTION\/\fP]... \-\-all \(aqx\(aq \[lq]y\[rq]  \" trailing
.BR cat (1),
.TP 8
.sp 2
a\&b C:\edir \s-1SMALL\s0
"""


def test_a_manual_page_keeps_headings_and_words_and_loses_requests():
    assert roff_text(MAN) == (
        "SEE ALSO\nls [OPTION]... --all 'x' “y”\ncat (1),\n8\nab C:\\dir SMALL\n"
    )
