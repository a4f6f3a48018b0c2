"""The results in README.md, generated from the recorded ladders.

python docs/results.py            print them
python docs/results.py --write    put them between the marks in README.md
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fathom.ladder.recorded import Arm, Study, read_study

ROOT = Path(__file__).parents[1]
RECORDS = ("studies/demo-gpu", "studies/demo-cpu")
BEGIN, END = "<!-- results: docs/results.py --write -->", "<!-- end of results -->"
HEAD = ("arm", "against", "bits per byte", "difference", "verdict", "parameters", "cache B/token")


def results(root: Path = ROOT) -> str:
    """The section's Markdown; without a record, how to make one."""
    found = [record for record in RECORDS if (root / record / "results.json").is_file()]
    if not found:
        return (
            "This checkout holds no recorded run of the demo. `make demo` makes one in minutes: "
            "`runs/demo/report.html`."
        )
    return "\n\n".join(section(root / record, record) for record in found)


def section(folder: Path, link: str) -> str:
    """One record: its question, its budget, the picture, and a line for every step."""
    study = read_study(folder)
    rows = [HEAD, ("---",) * len(HEAD), *map(_row, study.arms)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    parts = [f"### {study.title}", study.question, _setting(study), *_pictures(folder, link), table]
    parts += [_reading(study), _anchors(study), f"{study.lr_note}"]
    links = f"[report.html]({link}/report.html), [results.json]({link}/results.json)"
    parts.append(f"The whole record: {links}. Again: {_commands(study)}.")
    return "\n\n".join(part for part in parts if part)


def _setting(study: Study) -> str:
    seeds = max((arm.n for arm in study.arms), default=0)
    known = ("device", "cores", "torch", "python")
    machine = ", ".join(f"{key} {study.env[key]}" for key in known if key in study.env)
    return f"{study.budget} {seeds} seeds an arm. Measured on: {machine}."


def _row(arm: Arm) -> tuple[str, ...]:
    sizes = (
        f"{number:,.0f}" if number else "" for number in (arm.params, arm.cache_bytes_per_token)
    )
    parent = arm.parent or ""
    if arm.failed is not None:
        return (arm.name, parent, "", "", f"failed: {_cell(arm.failed)}", *sizes)
    spread = "" if arm.std is None else f" ± {arm.std:.4f}"
    loss = "" if arm.mean is None else f"{arm.mean:.4f}{spread}"
    verdict = arm.verdict
    if verdict is None:
        return (arm.name, parent, loss, "", "", *sizes)
    delta = "" if verdict.delta is None else f"{verdict.delta:+.4f}"
    if verdict.interval is not None:
        delta += " ({:+.4f} to {:+.4f})".format(*verdict.interval)
    return (arm.name, parent, loss, delta, f"**{verdict.word}**", *sizes)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _reading(study: Study) -> str:
    return (
        "Bits per byte of held-out text: mean and standard deviation over seeds, lower is better. "
        "A difference is the arm's loss minus its parent's, with an interval that holds for all "
        f"arms together; *same* means within ±{study.margin:g}."
    )


def _anchors(study: Study) -> str:
    names = {
        "xz": "`xz -9e`",
        "xz_after_training": "`xz -9e` after the training text",
        "order2": "counting byte triples",
    }
    known = [
        f"{what} {study.anchors[name].mean:.3f}"
        for name, what in names.items()
        if name in study.anchors and study.anchors[name].mean is not None
    ]
    return f"On the same held-out text: {', '.join(known)}." if known else ""


def _pictures(folder: Path, link: str) -> list[str]:
    """The chart of differences, if it is there."""
    caption = "Each arm's difference from its parent, with intervals"
    return [f"![{caption}]({link}/forest.png)"] if (folder / "forest.png").is_file() else []


def _commands(study: Study) -> str:
    return ", ".join(f"`{command}`" for command in study.commands) or "`make demo`"


def in_readme(text: str, section: str) -> str:
    """A README with ``section`` between the marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, "README.md has the two marks once"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{section}\n\n{END}", text)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The results in README.md.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    if not parser.parse_args(args).write:
        print(results())  # noqa: T201
        return
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text(encoding="utf-8"), results()), encoding="utf-8")


if __name__ == "__main__":
    main()
