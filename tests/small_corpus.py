"""A prepared corpus that is read in a blink, for tests that train through the whole machinery."""

from pathlib import Path

from fathom.data.prepare import prepare


def small_corpus(folder: Path) -> Path:
    """200 short texts of a few words in ``folder/corpus``: under 400 ids, some held out."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(200):
        words = (f"word{i * k % 13}" for k in range(1, 20))
        (texts / f"text-{i}.txt").write_text(f"{i} {' '.join(words)}", encoding="utf-8")
    prepare([texts], folder / "corpus", vocab_size=300)
    return folder / "corpus"
