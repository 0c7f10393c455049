"""Inspection: supervised tokens are marked correctly, figures are correct, and the commands report errors."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from PIL import Image

from florence_vl.cli.main import main
from florence_vl.data.encode import RecordEncoder
from florence_vl.data.inspect import collect_stats, histogram, html_page, inspect_records, plain_text, rich_text
from florence_vl.data.readers import open_reader
from florence_vl.model.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def encoder():
    return RecordEncoder(tiny_processor(), max_length=120, on_long="drop")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), (255, 0, 0)).save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    (tmp_path / "broken.png").write_bytes(buffer.getvalue()[:100])

    def turns(*texts):
        return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]

    rows = [
        {
            "id": "a",
            "image": "red.png",
            "conversations": turns("<image>\nWhat <b>?", "A red car.", "More?", "No & no."),
        },
        {"id": "b", "conversations": turns("hello", "a dog")},
        {"id": "c", "image": "broken.png", "conversations": turns("<image> q", "a")},
        {"id": "d", "conversations": turns("q")},
        {"id": "e", "conversations": turns("q", "house " * 200)},
        {"id": "f", "image": ["red.png"] * 2, "conversations": turns("<image><image> q", "a")},
        {"id": "g", "image": "nowhere.png", "conversations": turns("<image> q", "a")},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_segments_are_the_labels(data, encoder):
    good, *_ = inspect_records(open_reader(data), [0], encoder)
    assert [s.kind for s in good.segments if s.kind != "context"] == ["image", "supervised", "supervised"]
    learned = [s.text for s in good.segments if s.kind == "supervised"]
    assert [text.split("<|im_end|>")[0] for text in learned] == ["A red car.", "No & no."]
    assert sum(s.tokens for s in good.segments) == good.num_tokens
    assert sum(s.tokens for s in good.segments if s.kind == "supervised") == good.num_supervised
    assert "⟦A red car.<|im_end|>" in plain_text(good)
    assert f"[image 1: {encoder.processor.num_image_tokens()} tokens]" in plain_text(good)
    assert rich_text(good).plain.count("A red car.") == 1


def test_two_adjacent_images_are_two(data, encoder):
    (found,) = inspect_records(open_reader(data), [5], encoder)
    assert [s.text for s in found.segments if s.kind == "image"] == ["image 1", "image 2"]


def test_bad_records_say_why(data, encoder):
    found = list(inspect_records(open_reader(data), range(7), encoder))
    assert [s.error.kind if s.error else None for s in found] == [
        *(None, None, "image", "unsupervised", "too_long", None, "image")
    ]
    without = list(inspect_records(open_reader(data), range(7)))
    assert [s.error.kind if s.error else None for s in without] == [None, None, "image", None, None, None, "image"]
    assert "⟦A red car.⟧" in plain_text(without[0])


def test_stats(data, encoder):
    reader = open_reader(data)
    stats = collect_stats(reader, encoder=encoder, check_images=True)
    assert stats.bad == {"image": 2, "unsupervised": 1, "too_long": 1}
    summary = stats.summary()
    assert (summary["records"], summary["examined"]) == (7, 7)
    assert summary["bad_share"] == pytest.approx(4 / 7)
    assert summary["text_only_share"] == pytest.approx(1 / 3)
    assert summary["images"]["max"] == 2
    assert summary["turns"]["total"] == 4
    assert summary["tokens"]["total"] == sum(len(encoder(reader[i])) for i in (0, 1, 5))
    assert "nowhere.png" in stats.examples["image"] or "broken.png" in stats.examples["image"]
    assert collect_stats(reader, limit=3).examined == 3


def test_histogram_counts_everything():
    lines = histogram([1, 1, 2, 10, 100], bins=4)
    assert [int(line.split()[-1]) for line in lines] == [4, 0, 0, 1]
    assert lines[0].split()[0] == "1-25"
    assert histogram([]) == []
    assert histogram([7, 7]) == ["7-7 " + "█" * 40 + " 2"]


def test_the_page_is_escaped_and_holds_the_pictures(data, encoder):
    page = html_page(list(inspect_records(open_reader(data), range(4), encoder)), "a <title>")
    assert page.count("data:image/jpeg;base64,") == 1
    assert 'alt="400x200"' in page
    assert "What &lt;b&gt;?" in page
    assert "<title>a &lt;title&gt;</title>" in page
    assert re.search(r"<span class=supervised>A red car\.&lt;\|im_end\|&gt;", page)
    assert "class=bad>image:" in page


def call(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of `florence-vl data ...`."""
    monkeypatch.setattr(sys, "argv", ["florence-vl", "data", *map(str, arguments)])
    try:
        code = main()
    except SystemExit as done:
        code = done.code
    out, err = capsys.readouterr()
    return code or 0, out, err


def test_inspect_command(data, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    tiny_processor().save_pretrained(model)
    code, out, _ = call(
        monkeypatch, capsys, "inspect", data, "--model", model, "-n", 3, "--html", tmp_path / "out" / "page.html"
    )
    assert code == 0
    assert "⟦A red car.<|im_end|>" in out
    assert "skipped in training (image)" in " ".join(out.split())
    assert "tokens per record, 7 of 7 records" in out
    assert "data:image/jpeg" in (tmp_path / "out" / "page.html").read_text()
    code, out, _ = call(monkeypatch, capsys, "inspect", data, "-n", 1)
    assert code == 0
    assert "give --model" in out


def test_stats_command(data, monkeypatch, capsys):
    code, out, _ = call(
        monkeypatch, capsys, "stats", data, "--json", "--check-images", "--dataset", "llava-instruct-665k"
    )
    assert code == 0
    figures = json.loads(out)
    assert (figures["records"], figures["stated_records"], figures["bad"]) == (7, 665_298, {"image": 2})
    code, out, _ = call(monkeypatch, capsys, "stats", data)
    assert code == 0
    assert "7 records, 7 examined" in out


def test_stats_say_what_trees_would_save(data, tmp_path, monkeypatch, capsys):
    tiny_processor().save_pretrained(tmp_path / "model")
    album = tmp_path / "album.json"
    album.write_text(json.dumps(json.loads(data.read_text())[:1] * 4))
    (tmp_path / "r.yaml").write_text(f"steps: 1\ndata: {{sources: [{{path: {album}, image_root: {data.parent}}}]}}")
    for source in ([album, "--image-root", data.parent], [tmp_path / "r.yaml"]):
        code, out, _ = call(monkeypatch, capsys, "stats", *source, "--model", tmp_path / "model", "--json")
        assert code == 0
        layouts = json.loads(out)["layouts"]
        assert layouts["records"]["images"] == 4
        assert layouts["records as trees"]["images"] == 1
        assert layouts["records as trees"]["tokens"] < layouts["records"]["tokens"]
    code, out, _ = call(monkeypatch, capsys, "stats", album, "--image-root", data.parent, "--model", tmp_path / "model")
    assert code == 0
    assert "the first 4 records" in out
    assert "records as trees" in out


def test_a_recipe_counts_tokens_at_its_own_resolution(data, tmp_path, monkeypatch, capsys):
    for part in tiny_model():
        part.save_pretrained(tmp_path / "model")
    source = f"{{path: {data}, image_root: {data.parent}}}"
    recipe = f"steps: 1\nmodel: {{path: {tmp_path / 'model'}}}\ndata: {{sources: [{source}]}}"
    (tmp_path / "r.yaml").write_text(recipe)
    found = []
    for override in ("model.image_size=64", "model.image_size=32"):
        code, out, _ = call(monkeypatch, capsys, "stats", tmp_path / "r.yaml", override, "--json", "--trees", 0)
        assert code == 0
        found.append(json.loads(out))
    images = found[0]["images"]["total"]
    assert images > 0
    assert found[0]["tokens"]["total"] - found[1]["tokens"]["total"] == (4 - 1) * images


def test_sources_command(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "sources")
    assert code == 0
    assert "docmatix\t1273215\tHuggingFaceM4/Docmatix\tMIT" in out
    code, out, _ = call(monkeypatch, capsys, "sources", "pixelprose")
    assert code == 0
    assert "status == success" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "rows.jsn"], "neither a data file nor a recipe"),
        (["stats", "DATA", "--reader", "lava"], "'llava'"),
        (["stats", "DATA", "--option", "x"], "not of the form key=value"),
        (["stats", "DATA", "--option", "captoin=x"], "no option 'captoin'"),
        (["stats", "DATA", "--max-length", "5"], "need --model"),
        (["stats", "DATA", "--trees", "5"], "--trees: needs --model or a recipe"),
        (["stats", "DATA", "a.b=c"], "overrides are for recipes"),
        (["inspect", "DATA", "--start", "7"], "has 7 records"),
        (["stats", "DATA", "--dataset", "docmatrix"], "'docmatix'"),
        (["sources", "docmatrix"], "'docmatix'"),
        (["stats", "DATA", "--model", "runs/none/model"], "model folder runs/none/model does not exist"),
    ],
)
def test_wrong_calls_are_explained_in_one_line(data, monkeypatch, capsys, arguments, message):
    arguments = [data if a == "DATA" else a for a in arguments]
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
