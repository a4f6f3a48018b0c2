from fathom.data.config import DataConfig
from fathom.data.loader import Loader
from fathom.data.peek import peek


def test_peek_shows_the_text_that_the_loader_gives(bundled):
    cfg = DataConfig(seq_len=64, weights={"prose": 1.0})
    shown = peek(bundled, cfg, 3, seed=5, batch_size=2)
    loader = Loader(bundled, cfg, batch_size=2, seed=5)
    for _ in range(3):
        loader.next()
    for row in loader.next().tokens.tolist():
        assert bundled.tokenizer.decode(row) in shown
    assert "row 1: prose, 1 piece(s)" in shown
    name = bundled.document_names("train", "prose")[loader.peek_rows(0)[0][0].document]
    assert f"  {name}: tokens " in shown


def test_borders_say_where_a_document_starts_goes_on_and_ends(make_dataset):
    dataset = make_dataset(a=(["alpha", "beta\x1b[2J\x07", "gamma " * 20], ["x"]))
    cfg = DataConfig(seq_len=40)
    shown = peek(dataset, cfg, 0, batch_size=4)
    assert "|alpha|" in shown
    assert "|beta?[2J?|" in shown
    assert "from its start, to its end" in shown
    assert "from its start, cut" in shown
    assert "continued, to its end" in shown
    assert "\x1b" not in shown


def test_an_image_is_drawn(bundled):
    shown = peek(bundled, DataConfig(seq_len=66, weights={"image": 1.0}), 0, batch_size=1)
    picture = shown.split("\n")[2:]
    assert [len(line) for line in picture] == [8] * 8
    cut = peek(bundled, DataConfig(seq_len=14, weights={"image": 1.0}), 0, batch_size=2)
    lines = cut.split("\n")
    (second,) = [i for i, line in enumerate(lines) if line.startswith("row 1")]
    assert lines[second + 2] == " " * 5 + picture[1][5:]  # the first row ended after 13 pixels
    assert set("".join(picture)) <= set(" .:-=+*#%@")
