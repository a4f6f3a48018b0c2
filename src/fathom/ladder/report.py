"""``results.json`` to ``report.html``: one file that needs nothing else, now or in ten years.

Vega and its relatives, the style and the data are written into the page. Its
Content-Security-Policy allows the two scripts that we wrote there (by hash) and no request to
anywhere. Everything that comes from files is escaped by Jinja, so a hostile arm name is text.
"""

import base64
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from fathom.ladder import charts, curves, readings, tables
from fathom.ladder.charts import Spec
from fathom.ladder.recorded import Study, read_study

PAGE = Path(__file__).with_name("page")
SYMBOLS = {
    "better": "✓",
    "same": "=",
    "worse": "✕",
    "unsure": "?",
    "failed": "!",
    "start": "○",
    "open": "·",
}
PICTURE_WIDTHS = {"forest": 640, "loss-flops": 480, "loss-cache": 480, "curves": 640}


def write_report(folder: Path) -> Path:
    """Draw ``folder/report.html`` from ``folder/results.json`` alone.

    Raises:
        ValueError: there is no results.json that can be read, or it lists no arms.
    """
    page = render(read_study(folder))
    path = folder / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def write_pictures(folder: Path, out_dir: Path) -> list[Path]:
    """The report's main charts as PNG files for documents: light theme, twice the pixels.

    Args:
        folder: where ``results.json`` is.
        out_dir: made if it is not there.

    Returns:
        The files written (``PICTURE_WIDTHS`` has their names); a chart without data is left out.

    Raises:
        ValueError: as ``write_report``.
    """
    drawn = main_charts(read_study(folder))
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name, width in PICTURE_WIDTHS.items():
        spec = drawn[name]
        if spec is not None:
            config = {**spec["config"], "background": charts.COLOURS["page"][0]}
            picture = {**spec, "width": width, "padding": 12, "config": config}
            path = out_dir / f"{name}.png"
            path.write_bytes(vl_convert.vegalite_to_png(picture, scale=2))
            written.append(path)
    return written


def main_charts(study: Study) -> dict[str, Spec | None]:
    """The charts of every study; None where it has nothing to draw."""
    cache = "cache bytes per token"
    return {
        "forest": charts.forest(study),
        "loss-flops": charts.loss_against(study, "flops_per_token", "FLOPs per token"),
        "loss-cache": charts.loss_against(study, "cache_bytes_per_token", cache, log=True),
        "curves": curves.learning(study),
        "gaps": curves.gaps(study),
    }


def render(study: Study) -> str:
    """The page's whole text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "fixed": tables.fixed,
        "signed": tables.signed,
        "si": tables.si,
        "words": tables.words,
        "outcome": tables.outcome,
    }
    bundle, script = vega_bundle(), (PAGE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        study=study,
        style=_style(),
        bundle=bundle,
        script=script,
        policy=_policy(bundle, script),
        symbols=SYMBOLS,
        anchors=tables.ANCHORS,
        counts=tables.count_verdicts(study),
        answer=tables.answer(study),
        why=tables.WHY.get(study.hold, ""),
        charts=main_charts(study),
        **_curves(study),
        **_routing(study),
        domains=tables.domain_table(study),
        probes=[
            _probe(study, index, found) for index, found in enumerate(readings.readings(study))
        ],
        seeds=tables.seed_table(study),
        rates=tables.rate_table(study),
        sweep=curves.sweep(study),
        sweep_table=tables.line_table(study.sweep, "Held-out bits per byte by learning rate"),
    )


@functools.cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that can stand inside HTML."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("\r\n", "\n")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    """No requests at all; of scripts, only these. Charts set styles on their own elements."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _style() -> str:
    """The style sheet, after both themes' colours from the charts' table."""
    light, dark = (
        "".join(f"--{name}:{pair[theme]};" for name, pair in charts.COLOURS.items())
        for theme in (0, 1)
    )
    return (
        f":root{{color-scheme:light;{light}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}"
        "@media (prefers-color-scheme:dark){:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}\n" + (PAGE / "style.css").read_text(encoding="utf-8")
    )


def _curves(study: Study) -> dict[str, Any]:
    found = curves.mean_curves(study)
    return {
        "curve_names": list(found),
        "curve_table": tables.line_table(found, "Held-out bits per byte by training tokens"),
    }


def _routing(study: Study) -> dict[str, Any]:
    """The experts' section: heat maps as ``(id, arm, caption, spec, its table, columns)``."""
    found = readings.routings(study)
    maps = []
    for index, routing in enumerate(found):
        layers = {str(layer): ratios for layer, ratios in enumerate(routing.load)}
        where = f"by domain, in layer {routing.layer}, where the domains differ most"
        for kind, name, ratios, about in (
            ("load", "layer", layers, "in each MoE layer"),
            ("domain", "domain", routing.by_domain, where),
        ):
            if ratios:
                said = f"{routing.arm}: load of the experts {about}"
                spec = charts.experts(f"Heat map, {said}, in fair shares.", ratios, name)
                numbers = tables.ratio_table(ratios, f"{said}, in fair shares", name)
                columns = max(map(len, ratios.values()))
                maps.append((f"{kind}-{index}", said, spec, numbers, columns))
    dots = [(r.arm, r.divergence, r.divergence_shuffled) for r in found if r.divergence is not None]
    return {
        "expert_maps": maps,
        "divergence": charts.divergence(dots),
        "routing_table": tables.figure_table(
            "Routing, measured on held-out text",
            {routing.arm: routing.figures for routing in found},
        ),
    }


def _probe(study: Study, index: int, found: readings.Reading) -> dict[str, Any]:
    """A probe's section: one chart for each figure that is a line, and its table."""
    drawn = []
    for place, (name, (x, arms)) in enumerate(found.lines.items()):
        said = f"{name} by {x}"
        spec = curves.lines(study, arms, f"Line chart: {found.title}, {said}.", x=x, y=name)
        if spec:
            numbers = tables.line_table(arms, f"{found.title}: {said}")
            drawn.append((f"probe-{index}-{place}", said, spec, numbers))
    names = tables.keys(arms for _, arms in found.lines.values())
    return {
        "id": f"probe-{index}",
        "title": found.title,
        "about": found.about,
        "table": found.table,
        "charts": drawn,
        "names": names,
        "first": curves.front(study, names) if names else "",
    }
