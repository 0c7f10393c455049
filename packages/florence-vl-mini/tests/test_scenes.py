"""Scenes: deterministic, boxes around the drawn objects, consistent annotations and answers, balanced questions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("florence_vl_mini")

from florence_vl_mini.scenes import DEFAULT_MIX, GROUPS, KINDS, RECORD_TASKS, SceneGenerator, assets, draw
from florence_vl_mini.scenes.annotations import TASK_PROMPTS, Question, Region, Scene, Text
from florence_vl_mini.scenes.questions import ask
from florence_vl_mini.scenes.shapes import PURE, SHAPES
from florence_vl_mini.scenes.wording import chat


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(SceneGenerator(3, "train", 256).scenes(400))


def test_same_seed_and_index_give_the_same_scene() -> None:
    one, other = SceneGenerator(5, "val", 128), SceneGenerator(5, "val", 128)
    for index in (0, 7, 1000):
        a, b = one[index], other[index]
        assert a.image.tobytes() == b.image.tobytes()
        assert (a.caption, a.regions, a.texts, a.questions) == (b.caption, b.regions, b.texts, b.questions)


def test_seed_split_and_index_each_change_the_scene() -> None:
    base = SceneGenerator(0, "train", 96)[4].image.tobytes()
    assert SceneGenerator(1, "train", 96)[4].image.tobytes() != base
    assert SceneGenerator(0, "test", 96)[4].image.tobytes() != base
    assert SceneGenerator(0, "train", 96)[5].image.tobytes() != base


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [128, 256])
def test_every_kind_draws_inside_the_picture(kind: str, size: int) -> None:
    for scene in SceneGenerator(0, "train", size, {kind: 1.0}).scenes(12):
        assert scene.image.size == (size, size)
        assert scene.kind == kind
        assert scene.caption
        assert scene.detailed_caption
        for item in [*scene.regions, *scene.texts]:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= size
            assert 0 <= top < bottom <= size


def test_box_of_a_sprite_is_where_its_pixels_are() -> None:
    """Nothing outside of the boxes changes when the objects are drawn, and each box's edges are touched."""
    rng = Random(0)
    for sprite in rng.sample(assets.sprites("train"), 40):
        image = draw.sprite_at(rng, sprite.id, 80, rotate=0.5)
        assert draw.visible_box(image) == (0, 0, *image.size)
        assert max(image.size) <= 80


def test_objects_do_not_overlap(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        if scene.kind != "objects":
            continue
        boxes = [r.box for r in scene.regions] + [t.box for t in scene.texts]
        for i, box in enumerate(boxes):
            assert not draw.overlaps(box, boxes[:i], gap=0)
            checked += 1
    assert checked > 100


def test_text_stands_out_from_its_ground() -> None:
    """Text pixels differ from the ground in brightness: the box of a text has dark and light pixels."""
    for scene in SceneGenerator(2, "train", 256, {"lettering": 1.0}).scenes(40):
        for text in scene.texts:
            patch = scene.image.convert("L").crop(tuple(int(v) for v in text.box))
            low, high = patch.getextrema()
            assert high - low > 60, (scene.id, text)


def test_splits_share_no_sprite_and_no_word() -> None:
    ids = [{s.id for s in assets.sprites(split)} for split in assets.SPLITS]
    words = [set(assets.words(split)) for split in assets.SPLITS]
    for group in (ids, words):
        assert all(group)
        assert not group[0] & group[1]
        assert not group[0] & group[2]
        assert not group[1] & group[2]
    train_names = {s.name for s in assets.sprites("train")}
    test = assets.sprites("test")
    assert any(s.new_concept for s in test)
    assert any(not s.new_concept for s in test)
    assert not any(s.name in train_names for s in test if s.new_concept)


def test_florence2_strings_parse_back(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        if scene.regions:
            parts = re.findall(r"([^<]+)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>", scene.od())
            assert [p[0] for p in parts] == [r.name for r in scene.regions]
            for part, region in zip(parts, scene.regions, strict=True):
                for value, edge in zip(part[1:], region.box, strict=True):
                    assert abs(int(value) * 256 / 1000 - edge) <= 256 / 1000 + 1e-6 or int(value) == 999
        if scene.texts:
            lines = re.findall(r"(.+?)((?:<loc_\d+>){8})", scene.ocr_with_region())
            assert [line[0] for line in lines] == [t.text for t in scene.texts]
        assert scene.ocr == " ".join(t.text for t in scene.texts)


def test_location_tokens_exactly() -> None:
    scene = SceneGenerator(0, "train", 100, {"single": 1.0})[0]
    scene.regions = [Region("dog", "large dog", (0.0, 25.0, 50.0, 100.0))]
    scene.texts = [Text("hi", (10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0), "red")]
    assert scene.od() == "dog<loc_0><loc_250><loc_500><loc_999>"
    assert scene.od(step=100) == "dog<loc_50><loc_250><loc_550><loc_950>"
    assert (
        scene.dense_region_caption()
        == "large dog<loc_0><loc_250><loc_500><loc_999>red text<loc_100><loc_100><loc_200><loc_200>"
    )
    assert scene.ocr_with_region() == "hi" + "".join(f"<loc_{v}>" for v in (100, 100, 200, 100, 200, 200, 100, 200))
    with pytest.raises(ValueError, match="<OCR>"):
        scene.target("<OCRR>")


def test_captions_count_what_is_there(scenes: list[Scene]) -> None:
    for scene in scenes:
        if scene.kind == "objects":
            for name, n in Counter(r.name for r in scene.regions).items():
                assert assets.counted(name, n) in scene.caption
            assert ("text" in scene.caption.split(" with ")[-1]) == bool(scene.texts) or "with" in scene.caption


def test_yes_and_no_are_balanced() -> None:
    answers: dict[str, Counter[str]] = {}
    for scene in SceneGenerator(9, "train", 64).scenes(700):
        for question in scene.questions:
            if question.answer in ("yes", "no"):
                answers.setdefault(question.group, Counter())[question.answer] += 1
    assert set(answers) == set(GROUPS)
    for group, counts in answers.items():
        share = counts["yes"] / sum(counts.values())
        spread = 3.5 * 0.5 / sum(counts.values()) ** 0.5
        assert abs(share - 0.5) < spread + 0.04, (group, counts)


def test_letters_of_multiple_choice_are_spread(scenes: list[Scene]) -> None:
    letters: Counter[str] = Counter()
    for scene in scenes:
        for question in scene.questions:
            if question.choices and len(question.choices) == 4:
                assert len(set(question.choices)) == 4
                assert question.answer in "ABCD"
                assert question.prompt.endswith("Answer with the option's letter from the given choices directly.")
                letters[question.answer] += 1
    assert min(letters[x] for x in "ABCD") > 0.15 * sum(letters.values())


def test_answers_follow_from_the_annotations(scenes: list[Scene]) -> None:
    """Each kind of answer is derived again from regions and texts by another route."""
    checked: Counter[str] = Counter()
    for scene in scenes:
        if scene.kind not in ("objects", "single"):
            continue
        names = [r.name for r in scene.regions]
        for q in scene.questions:
            if match := re.fullmatch(r"(?:Is|Are) there (?:an? |any )?(.+) in the picture\?", q.question):
                if q.group == "general" and "text" not in match[1]:
                    assert (q.answer == "yes") == (match[1] in names), (scene.id, q)
                    checked["existence"] += 1
            elif q.question.startswith("How many objects"):
                assert int(q.answer) == len(names)
                checked["count_all"] += 1
            elif match := re.fullmatch(r"How many (.+) are in the picture\?", q.question):
                assert int(q.answer) == sum(assets.plural(n) == match[1] for n in names) > 0
                checked["count"] += 1
            elif match := re.fullmatch(
                r"(?:Is|Are) the (.+) (to the left of|to the right of|above|below) the (.+)\?", q.question
            ):
                a = next(r for r in scene.regions if r.name == match[1]).box
                b = next(r for r in scene.regions if r.name == match[3]).box
                truth = {
                    "to the left of": a[0] + a[2] < b[0] + b[2],
                    "to the right of": a[0] + a[2] > b[0] + b[2],
                    "above": a[1] + a[3] < b[1] + b[3],
                    "below": a[1] + a[3] > b[1] + b[3],
                }[match[2]]
                assert (q.answer == "yes") == truth
                checked["spatial"] += 1
            elif q.question == "What is written in the picture?":
                assert [q.answer] == [t.text for t in scene.texts]
                checked["reading"] += 1
    assert all(checked[k] >= 10 for k in ("existence", "count_all", "count", "spatial", "reading")), checked


def test_absent_things_cannot_be_mistaken_for_present_ones() -> None:
    by_name = {s.name: s for split in assets.SPLITS for s in assets.sprites(split)}
    assert by_name["cat"].conflicts(by_name["cat face"])
    assert by_name["cupcake"].conflicts(by_name["birthday cake"])
    assert by_name["eagle"].conflicts(by_name["bird"])
    assert not by_name["cat"].conflicts(by_name["violin"])
    for scene in SceneGenerator(4, "train", 128, {"objects": 1.0}).scenes(150):
        for q in scene.questions:
            if q.skill == "existence" and q.answer == "no" and q.group == "general" and "text" not in q.question:
                absent = re.sub(r"^(Is|Are) there (an? |any )?| in the picture\?$", "", q.question)
                assert not any(by_name[absent].conflicts(by_name[r.name]) for r in scene.regions)


def test_document_answers_are_written_in_the_picture() -> None:
    for kind in ("receipt", "form", "table", "bar_chart", "line_chart"):
        for scene in SceneGenerator(1, "train", 256, {kind: 1.0}).scenes(25):
            shown = {t.text for t in scene.texts}
            for q in scene.questions:
                if q.skill in (
                    "document_field",
                    "table_value",
                    "chart_value",
                    "chart_extreme",
                    "comparison",
                    "reading",
                ):
                    assert q.answer in shown, (scene.id, q)


def test_records_of_all_tasks(scenes: list[Scene]) -> None:
    scene = next(s for s in scenes if s.kind == "objects" and s.texts)
    for task in RECORD_TASKS:
        if task == "knowledge" and not any(q.group == "knowledge" for q in scene.questions):
            continue
        record = scene.record(task)
        assert record["messages"][0]["content"][0] == {"type": "image"}
        assert record["images"] == [scene.image]
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * (len(record["messages"]) // 2)
    caption = scene.record("detailed_caption")
    assert caption["messages"][0]["content"][1]["text"] == TASK_PROMPTS["<DETAILED_CAPTION>"]
    assert caption["messages"][1]["content"][0]["text"] == scene.detailed_caption
    with pytest.raises(ValueError, match="od"):
        scene.record("odd")
    silent = next(s for s in scenes if not s.texts)
    with pytest.raises(ValueError, match="no annotation"):
        silent.record("ocr")


def test_scenes_import_nothing_of_the_library() -> None:
    folder = Path(assets.__file__).parent
    for file in folder.glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) florence_vl(?:\.|\s)", file.read_text(), re.M), file.name


def test_shapes_are_drawn_and_told_in_their_color() -> None:
    """The middle of a filled circle or square has the named color, and answers follow from the regions."""
    checked: Counter[str] = Counter()
    for scene in SceneGenerator(7, "train", 256, {"shapes": 1.0}).scenes(150):
        shapes = Counter(r.name for r in scene.regions)
        assert set(shapes) <= set(SHAPES)
        for region in scene.regions:
            color = region.description.removesuffix(f" {region.name}")
            left, top, right, bottom = region.box
            seen = scene.image.getpixel((int((left + right) / 2), int((top + bottom) / 2)))
            near = min(
                sum(abs(a - b) for a, b in zip(seen, table[color], strict=True))
                for table in (draw.COLORS, PURE)
                if color in table
            )
            if region.name in ("circle", "square") and near <= 21:
                checked["color"] += 1
        for q in scene.questions:
            if q.question == "How many shapes are in the picture?":
                assert int(q.answer) == len(scene.regions)
            elif match := re.fullmatch(r"How many (.+) are in the picture\?", q.question):
                assert int(q.answer) == sum(n for s, n in shapes.items() if assets.plural(s) == match[1])
                checked["count"] += 1
            elif match := re.fullmatch(r"Is there an? (.+) in the picture\?", q.question):
                assert (q.answer == "yes") == (match[1] in {r.description for r in scene.regions})
                checked["existence"] += 1
            elif q.question == "What color is the background?":
                assert f"{q.answer} background" in scene.detailed_caption
    circles = sum(r.name in ("circle", "square") for s in SceneGenerator(7, "train", 256, {"shapes": 1.0}).scenes(150)
                  for r in s.regions)  # fmt: skip
    assert checked["color"] > 0.8 * circles  # the others are outlines
    assert min(checked["count"], checked["existence"]) > 100


def test_answers_about_interfaces_are_written_in_them() -> None:
    for kind in ("interface", "small_text"):
        for scene in SceneGenerator(1, "test", 256, {kind: 1.0}).scenes(25):
            shown = {t.text for t in scene.texts}
            assert all(q.answer in shown for q in scene.questions if q.skill == "reading"), scene.id
            assert len(scene.ocr) <= 96


def test_answers_about_what_people_draw_follow_from_it() -> None:
    for kind in ("sign", "price_list", "dialog"):
        for scene in SceneGenerator(2, "train", 256, {kind: 1.0}).scenes(25):
            shown = {t.text for t in scene.texts}
            for q in scene.questions:
                if q.skill in ("reading", "document_field"):
                    assert q.answer in shown | {scene.ocr}, (scene.id, q)
    for scene in SceneGenerator(2, "train", 256, {"price_list": 1.0}).scenes(25):
        prices = [float(t.text.lstrip("$")) for t in scene.texts if re.fullmatch(r"\$?\d+\.\d\d", t.text)]
        if scene.caption == "a receipt":
            assert prices[-1] == pytest.approx(sum(prices[:-1]))
    for scene in SceneGenerator(2, "train", 256, {"plain_chart": 1.0}).scenes(60):
        bars = [r for r in scene.regions if r.name == "bar"]
        names = [t.text for t in scene.texts][-len(bars) :]
        for q in scene.questions:
            if bars and "highest" in q.question:
                assert q.answer == names[min(range(len(bars)), key=lambda i: bars[i].box[1])]


def test_pages_of_any_proportion_keep_their_annotations() -> None:
    """The shapes' boxes hold what was drawn: outside of boxes and texts there is the ground alone."""
    flat = 0
    for scene in SceneGenerator(4, "train", 256, {"drawing": 1.0}).scenes(60):
        image = scene.image.copy()
        for item in [*scene.regions, *scene.texts]:
            left, top, right, bottom = item.box
            image.paste((0, 0, 0), (int(left) - 4, int(top) - 4, int(right) + 5, int(bottom) + 5))
        left = sorted(image.getcolors(1 << 16) or [], reverse=True)
        ground = next(color for _, color in left if color != (0, 0, 0)) if len(left) > 1 else (0, 0, 0)
        strays = sum(n for n, c in left if sum(abs(a - b) for a, b in zip(c, ground, strict=True)) > 40 and sum(c))
        flat += strays < 12
    assert flat >= 57  # JPEG leaves marks in a few


def test_conversations_keep_the_truth_in_other_words() -> None:
    asked: Counter[str] = Counter()
    mix = {"shapes": 1.0, "objects": 1.0, "receipt": 1.0, "drawing": 1.0}
    for scene in SceneGenerator(6, "train", 96, mix).scenes(150):
        turns = scene.chat()
        assert turns == scene.chat()
        assert len(turns) <= 5
        for prompt, answer in turns:
            assert answer
            assert "{" not in prompt + answer
            asked["short" if "single word" in prompt else "plain"] += 1
            asked["sentence"] += answer.endswith(".") and " " in answer
    assert min(asked.values()) > 40
    answers = {"left": "yes", "right": "no"}
    for side, answer in answers.items():
        scene.questions = [Question("vision_centric", "spatial", f"Is the a to the {side} of the b?", answer)]
        for number in range(40):
            (prompt, said), *_ = chat(scene, Random(number), 1)
            if found := re.match(r"Is the (\w) (?:on the|to the)? ?(left|right)", prompt):
                assert (found[1] == "a") == ((found[2] == "left") == (said.strip(".").lower() == "yes"))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="train"):
        SceneGenerator(split="trian")
    with pytest.raises(ValueError, match="64"):
        SceneGenerator(size=32)
    with pytest.raises(ValueError, match="lettering"):
        SceneGenerator(mix={"letering": 1.0})
    with pytest.raises(ValueError, match="positive"):
        SceneGenerator(mix={"single": -1.0})
    with pytest.raises(IndexError):
        SceneGenerator()[-1]


def test_grammar() -> None:
    assert assets.counted("mouse", 2) == "two mice"
    assert assets.counted("owl", 1) == "an owl"
    assert assets.counted("unicorn", 1) == "a unicorn"
    assert assets.plural("butterfly") == "butterflies"
    assert assets.plural("tropical fish") == "tropical fish"
    assert assets.with_article("paw prints") == "paw prints"
    assert assets.with_article("large scissors") == "large scissors"
    assert assets.with_article("popcorn") == "some popcorn"


def test_no_countable_name_is_a_plural_already() -> None:
    names = {sprite.name for split in ("train", "val", "test") for sprite in assets.sprites(split) if sprite.countable}
    singular = ("ss", "us")  # glass, bus
    assert {name for name in names if name.endswith("s") and not name.endswith(singular)} <= {"rhinoceros"}


def test_mix_is_followed() -> None:
    kinds = Counter(s.kind for s in SceneGenerator(0, "train", 64).scenes(500))
    for kind, weight in DEFAULT_MIX.items():
        assert abs(kinds[kind] / 500 - weight) < 0.08


def test_questions_come_from_their_own_random_numbers() -> None:
    """Asking again with the same numbers gives the same questions; the picture has no part in it."""
    scene = SceneGenerator(0, "train", 128, {"objects": 1.0})[3]
    assert ask(scene, Random("q/0/train/3"), "train") == scene.questions


def test_each_category_is_absent_as_often_as_present() -> None:
    """A model that knows only how often each question is answered yes gains nothing."""
    counts: dict[str, Counter[str]] = {}
    for scene in SceneGenerator(21, "train", 64, {"objects": 1.0}).scenes(1200):
        for q in scene.questions:
            if q.skill == "category" and q.answer in ("yes", "no"):
                counts.setdefault(q.question, Counter())[q.answer] += 1
    blind = sum(max(c.values()) for c in counts.values()) / sum(sum(c.values()) for c in counts.values())
    assert blind < 0.6, counts
