"""Tables of real numbers: in the package, as generated, and in charts and documents."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

mini = pytest.importorskip("florence_vl_mini")
made = pytest.importorskip("florence_vl_mini.assets.tables")

from florence_vl_mini.scenes import SceneGenerator, assets, tables  # noqa: E402


def test_tables_fit_a_small_picture_and_say_where_they_are_from() -> None:
    rows = mini.load_tables()
    assert len(rows) == len({r["id"] for r in rows}) > 100
    assert (mini.DATA / "tables.json").stat().st_size < 200_000
    for row in rows:
        assert len(row["title"]) <= 18
        assert 3 <= len(row["labels"]) == len(set(row["labels"])) <= 8
        assert all(len(label) <= 10 and label.isascii() for label in row["labels"])
        for column in row["columns"]:
            assert len(column["values"]) == len(row["labels"])
            assert all(len(v) <= 4 and float(v) >= 0 for v in column["values"]), row["id"]
            assert column["unit"]
        package = row["source"].split(":")[0]
        assert (mini.DATA / "licences" / package / "LICENSE").is_file()
        assert row["licence"].startswith(("public domain", "U.S. Government", "CC-BY-4.0", "CC0", "OGL-3.0"))
        if row["kind"] == "parts":
            assert sum(int(v) for v in row["columns"][0]["values"]) == 100
        if row["kind"] == "pairs":
            assert len(row["columns"]) == 2


def test_each_split_has_tables_of_its_own_of_each_kind() -> None:
    kinds = Counter((r["split"], r["kind"]) for r in mini.load_tables())
    for split in assets.SPLITS:
        assert all(kinds[split, kind] for kind in ("series", "groups", "parts", "pairs"))
    titles = [{t.title for t in tables.tables(split)} for split in assets.SPLITS]
    assert not titles[0] & titles[1]
    assert not titles[0] & titles[2]
    assert not titles[1] & titles[2]


def test_numbers_are_rounded_to_what_can_be_written() -> None:
    assert made.cells([1.25, 72.34]) == ["1.2", "72.3"]
    assert made.cells([99.94, 316.1]) == ["100", "316"]
    assert made.cells([0.123, 1.0], 2) == ["0.12", "1.00"]
    with pytest.raises(ValueError, match="larger unit"):
        made.cells([12345.0])
    assert made.percents([1, 1, 1]) == [34, 33, 33]
    assert sum(made.percents([17, 3, 9, 1])) == 100


def test_half_of_the_charts_show_a_table_s_own_numbers() -> None:
    """Title, label and value of each question belong together in a table of that split."""
    for split in ("train", "test"):
        known = {t.title: t for t in tables.tables(split)}
        for kind in ("bar_chart", "line_chart", "pie_chart"):
            real = 0
            for scene in SceneGenerator(5, split, 192, {kind: 1.0}).scenes(40):
                table = known.get(scene.texts[0].text)
                if table is None:
                    continue
                real += 1
                notes = {f"{c.name} ({c.unit})": c for c in table.columns}
                column = table.columns[0] if kind == "pie_chart" else notes[scene.texts[1].text]
                question = next(q for q in scene.questions if q.skill == "chart_value")
                shown = [
                    i
                    for i, x in enumerate(table.labels)
                    if f" {x}?" in question.question or f" {x}," in question.question
                ]
                assert column.texts[shown[0]] == question.answer
                for q in scene.questions:
                    if q.skill == "chart_extreme":
                        numbers = {
                            x: float(v)
                            for x, v in zip(table.labels, column.texts, strict=True)
                            if any(x == t.text or t.text.startswith(f"{x} ") for t in scene.texts)
                        }
                        best = max if "highest" in q.question else min
                        assert q.answer == best(numbers, key=lambda x: numbers[x])
            assert 8 <= real <= 32, (split, kind, real)


def test_real_documents_and_points_are_a_table_s_own() -> None:
    rows = {
        (t.label, label, v)
        for t in tables.tables("val")
        for c in t.columns
        for label, v in zip(t.labels, c.texts, strict=True)
    }
    corners = {t.label for t in tables.tables("val")}
    real = 0
    for scene in SceneGenerator(2, "val", 192, {"table": 1.0}).scenes(40):
        corner = scene.texts[0].text
        if corner in corners:
            real += 1
            question = next(q for q in scene.questions if q.skill == "table_value")
            label = question.question.removeprefix("What is the value of ").split(" in the column")[0]
            assert (corner, label, question.answer) in rows
    assert 8 <= real <= 32
    titles = {t.title for t in tables.tables("val") if t.kind == "pairs"}
    shown = SceneGenerator(2, "val", 192, {"scatter_chart": 1.0}).scenes(60)
    real_points = [s for s in shown if s.texts[0].text in titles]
    assert 4 <= len(real_points) <= 30
    for scene in real_points:
        assert "by" in scene.texts[1].text
        assert int(next(q.answer for q in scene.questions if q.skill == "counting")) >= 3


def test_labels_do_not_touch_their_neighbors() -> None:
    """The texts of real charts do not overlap one another."""
    for kind in ("bar_chart", "table", "pie_chart"):
        for scene in SceneGenerator(8, "train", 256, {kind: 1.0}).scenes(60):
            for i, a in enumerate(scene.texts):
                for b in scene.texts[:i]:
                    (l1, t1, r1, b1), (l2, t2, r2, b2) = a.box, b.box
                    assert r1 <= l2 + 1 or r2 <= l1 + 1 or b1 <= t2 + 1 or b2 <= t1 + 1, (scene.id, a.text, b.text)


def test_other_kinds_of_scene_know_nothing_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = {"single": 1.0, "objects": 1.0, "lettering": 1.0, "receipt": 1.0, "form": 1.0}
    before = [(s.image.tobytes(), s.questions) for s in SceneGenerator(1, "train", 96, mix).scenes(20)]

    def none(_: str) -> tuple[tables.Table, ...]:
        raise AssertionError("tables were read")

    monkeypatch.setattr(tables, "tables", none)
    monkeypatch.setattr(tables, "SHARE", 1.0)
    assert before == [(s.image.tobytes(), s.questions) for s in SceneGenerator(1, "train", 96, mix).scenes(20)]
    with pytest.raises(AssertionError, match="tables were read"):
        SceneGenerator(1, "train", 96, {"bar_chart": 1.0})[0]


def test_a_whole_is_never_cut() -> None:
    rng = Random(0)
    for _ in range(60):
        shown = tables.pick(rng, "train", ("parts",), (3, 5), lambda *_: True)
        assert sum(shown.values) == 100


def test_a_table_of_other_numbers_is_refused(tmp_path) -> None:
    (tmp_path / "datapackage.json").write_text('{"resources": []}')
    with pytest.raises(ValueError, match=r"no license for airports\.csv"):
        made.make_tables(tmp_path, tmp_path)
