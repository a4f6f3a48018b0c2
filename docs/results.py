"""What the recorded studies say, put into README.md and docs/claims.md.

python docs/results.py            print README's section
python docs/results.py --write    write both

Marks in ``docs/claims.md`` say which arms of which records answer a claim, the weightiest record
first, and which record is shown whole:

    <!-- verdicts share-kv, demo-gpu: gqa, mqa -->
    <!-- arms demo-gpu -->

The page gets the answers of every record that this checkout holds; README gets those of the first.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fathom.ladder.recorded import Arm, Study, read_study
from fathom.ladder.tables import si

ROOT = Path(__file__).parents[1]
README, PAGE = Path("README.md"), Path("docs/claims.md")
LADDERS = ("demo-gpu", "demo-cpu")  # README's picture is the first that there is
BEGIN, END = "<!-- results: docs/results.py --write -->", "<!-- end of results -->"
BLOCK = re.compile(r"(<!-- (verdicts|arms) (.+?) -->)\n.*?(<!-- end -->)", re.DOTALL)
CLAIMS = ("claim", "verdict", "difference in bits per byte", "at", "record")
ARMS = ("arm", "against", "bits per byte", "difference", "verdict", "parameters", "cache B/token")


def in_readme(root: Path, text: str) -> str:
    """A README with its section between the marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, "README.md has the two marks once"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{results(root)}\n\n{END}", text)


def in_page(root: Path, text: str) -> str:
    """A page of claims with what the records say between its marks."""

    def filled(block: re.Match[str]) -> str:
        begin, kind, asked, end = block.groups()
        said = whole(root, asked) if kind == "arms" else verdicts(root, asked)
        return f"{begin}\n\n{said}\n\n{end}"

    return BLOCK.sub(filled, text)


def results(root: Path) -> str:
    """README's section: the ladder's picture, and the first answer to every claim."""
    ladder = next(recorded(root, LADDERS), None)
    if ladder is None:
        return (
            "This checkout holds no recorded run of the demo. `make demo` makes one in minutes: "
            "`runs/demo/report.html`."
        )
    name, study = ladder
    blocks = BLOCK.findall((root / PAGE).read_text(encoding="utf-8"))
    asked = [asked for _, kind, asked, _ in blocks if kind == "verdicts"]
    rows = [row for claims in asked for row in next(answers(root, claims, link="studies"), [])]
    parts = [
        f"### {study.title}",
        study.question,
        setting(study),
        picture(root, name, link="studies"),
        "The claims, each answered by the weightiest record that asks it:",
        markdown(CLAIMS, rows),
        "A difference is the arm's held-out loss minus its parent's, mean over seeds, with an "
        "interval that holds for all arms of a study together; below zero is better.",
        anchors(study),
    ]
    return "\n\n".join(part for part in parts if part)


def recorded(root: Path, names: Iterable[str]) -> Iterator[tuple[str, Study]]:
    """Those of the records that this checkout holds, with the names of their folders."""
    for name in names:
        if (root / "studies" / name / "results.json").is_file():
            yield name, read_study(root / "studies" / name)


def answers(root: Path, asked: str, *, link: str) -> Iterator[list[Sequence[str]]]:
    """For every record, a row for each of its arms that is asked for: ``records: arms``."""
    names, arms = (part.split(", ") for part in asked.split(": "))
    for name, study in recorded(root, names):
        rows = [_answer(name, study, arm, link) for arm in study.arms if arm.name in arms]
        if rows:
            yield rows


def verdicts(root: Path, asked: str) -> str:
    """The answers of every record, and which of them this checkout does not hold."""
    rows = [row for rows in answers(root, asked, link="../studies") for row in rows]
    names = asked.partition(":")[0].split(", ")
    missing = set(names) - {name for name, _ in recorded(root, names)}
    said = [markdown(CLAIMS, rows)] if rows else []
    if missing:
        lacking = ", ".join(f"`{name}`" for name in names if name in missing)
        said.append(f"Not recorded here: {lacking}.")
    return "\n\n".join(said)


def whole(root: Path, name: str) -> str:
    """One record: its question, its budget, the picture, and a line for every arm."""
    if not (root / "studies" / name / "results.json").is_file():
        return f"Not recorded here: `{name}`."
    study = read_study(root / "studies" / name)
    reading = (
        "Bits per byte of held-out text: mean and standard deviation over seeds, lower is better; "
        f"*same* means within ±{study.margin:g}."
    )
    again = ", ".join(f"`{command}`" for command in study.commands)
    parts = [
        study.question,
        setting(study),
        picture(root, name, link="../studies"),
        markdown(ARMS, map(_arm, study.arms)),
        reading,
        anchors(study),
        study.lr_note,
        f"The record: {_link(name, '../studies')}. Again: {again}." if again else "",
    ]
    return "\n\n".join(part for part in parts if part)


def setting(study: Study) -> str:
    """What was equal, and where it ran."""
    seeds = max((arm.n for arm in study.arms), default=0)
    known = ("device", "cores", "torch", "python")
    machine = ", ".join(f"{key} {study.env[key]}" for key in known if key in study.env)
    return f"{study.budget} {seeds} seeds an arm. Measured on: {machine}."


def picture(root: Path, name: str, *, link: str) -> str:
    """The chart of differences, if it is there."""
    if not (root / "studies" / name / "forest.png").is_file():
        return ""
    return f"![Each arm's difference from its parent, with intervals]({link}/{name}/forest.png)"


def anchors(study: Study) -> str:
    """What needs no training, on the same text."""
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


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _answer(name: str, study: Study, arm: Arm, link: str) -> Sequence[str]:
    where = f"{arm.n} seeds, {si(arm.params)} parameters, {si(arm.tokens)} tokens"
    claim, record = _cell(arm.claim), _link(name, link)
    if arm.failed is not None:
        return claim, f"failed: {_cell(arm.failed)}", f"{arm.name} against {arm.parent}", "", record
    word = f"**{arm.verdict.word}**" if arm.verdict else ""
    return claim, word, f"{arm.name} against {arm.parent}: {_delta(arm)}", where, record


def _arm(arm: Arm) -> Sequence[str]:
    sizes = (
        f"{number:,.0f}" if number else "" for number in (arm.params, arm.cache_bytes_per_token)
    )
    parent = arm.parent or ""
    if arm.failed is not None:
        return arm.name, parent, "", "", f"failed: {_cell(arm.failed)}", *sizes
    spread = "" if arm.std is None else f" ± {arm.std:.4f}"
    loss = "" if arm.mean is None else f"{arm.mean:.4f}{spread}"
    word = f"**{arm.verdict.word}**" if arm.verdict else ""
    return arm.name, parent, loss, _delta(arm), word, *sizes


def _delta(arm: Arm) -> str:
    verdict = arm.verdict
    if verdict is None or verdict.delta is None:
        return ""
    interval = "" if verdict.interval is None else " ({:+.4f} to {:+.4f})".format(*verdict.interval)
    return f"{verdict.delta:+.4f}{interval}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _link(name: str, folder: str) -> str:
    return f"[{name}]({folder}/{name}/results.json)"


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The results in README.md and docs/claims.md.")
    parser.add_argument("--write", action="store_true", help="put them there")
    if not parser.parse_args(args).write:
        print(results(ROOT))  # noqa: T201
        return
    for path, filled in ((PAGE, in_page), (README, in_readme)):
        text = (ROOT / path).read_text(encoding="utf-8")
        (ROOT / path).write_text(filled(ROOT, text), encoding="utf-8")


if __name__ == "__main__":
    main()
