"""Questions about objects and lettering: only what a person would answer the same way; yes and no are balanced.

A yes/no question first draws its answer, then what to ask; existence questions follow POPE (half of the absent objects
are of the kind of a present one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from random import Random

from florence_vl_mini.scenes import assets
from florence_vl_mini.scenes.annotations import Question, Region, Scene, Text
from florence_vl_mini.scenes.assets import Sprite, with_article

PER_GROUP = 2

# What people call a category, the categories it holds, and those too near to it for a clear "no".
SUPER = {
    "an animal": ({"animal", "bird", "sea animal", "insect or other small animal"}, {"food"}),
    "a bird": ({"bird"}, {"animal", "insect or other small animal"}),
    "a fruit": ({"fruit"}, {"vegetable", "plant", "food", "sweet food", "drink"}),
    "a plant": ({"plant"}, {"fruit", "vegetable", "food"}),
    "a vehicle": ({"vehicle"}, {"sports item"}),
    "a building": ({"building"}, set()),
    "a musical instrument": ({"musical instrument"}, set()),
    "a piece of clothing": ({"clothing"}, {"sports item"}),
    "a tool": ({"tool"}, {"sports item", "musical instrument", "clothing"}),
    "something to eat": (
        {"fruit", "vegetable", "food", "sweet food"},
        {"animal", "bird", "sea animal", "plant", "drink", "insect or other small animal"},
    ),
}  # fmt: skip
# How often to ask for each where it is absent, so that every single question is answered yes as often as no.
ABSENT_WEIGHTS = {
    "an animal": 5.3, "a bird": 0.28, "a fruit": 0.29, "a plant": 0.71, "a vehicle": 0.52, "a building": 0.32,
    "a musical instrument": 0.16, "a piece of clothing": 0.3, "a tool": 0.4, "something to eat": 11.8,
}  # fmt: skip
KINDS_OF_THING = ("animal", "fruit", "vehicle", "building", "musical instrument", "clothing", "plant", "tool")

FACTS = assets.facts()


@lru_cache
def _sprites_by_name() -> dict[str, tuple[Sprite, ...]]:
    out: dict[str, list[Sprite]] = {}
    for split in assets.SPLITS:
        for sprite in assets.sprites(split):
            out.setdefault(sprite.name, []).append(sprite)
    return {name: tuple(group) for name, group in out.items()}


def _apart(name: str, others: list[str]) -> bool:
    """Whether `name` could be taken for none of `others`."""
    known = _sprites_by_name()
    return not any(a.conflicts(b) for o in others for a in known.get(name, ()) for b in known.get(o, ()))


def _distractors(rng: Random, split: str, names: list[str], n: int, like: str | None = None) -> list[str]:
    """Names of `n` absent things, apart from those present and from each other; of category `like` if possible."""
    pool = assets.by_category(split).get(like or "", ()) or assets.sprites(split)
    out: list[str] = []
    for attempt in range(80):
        if len(out) == n:
            break
        if attempt == 40:
            pool = assets.sprites(split)
        name = rng.choice(pool).name
        if _apart(name, [*names, *out]):
            out.append(name)
    return out


def multiple_choice(rng: Random, group: str, skill: str, question: str, answer: str, wrong: list[str]) -> Question:
    """The choices in random order; the answer becomes its letter."""
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return Question(group, skill, question, chr(65 + choices.index(answer)), tuple(choices))


def _is_there(name: str) -> str:
    article = with_article(name)
    verb = "Are" if article == name else "Is"
    return f"{verb} there {article.replace('some ', 'any ')} in the picture?"


def _existence(rng: Random, scene: Scene, split: str) -> Question | None:
    names = [r.name for r in scene.regions]
    if rng.random() < 0.5:
        return Question("general", "existence", _is_there(rng.choice(names)), "yes")
    like = rng.choice(scene.regions).category if rng.random() < 0.5 else None
    absent = _distractors(rng, split, names, 1, like)
    return Question("general", "existence", _is_there(absent[0]), "no") if absent else None


def _which_is_shown(rng: Random, scene: Scene, split: str) -> Question | None:
    names = [r.name for r in scene.regions]
    region = rng.choice(scene.regions)
    wrong = _distractors(rng, split, names, 3, region.category if rng.random() < 0.5 else None)
    if len(wrong) < 3:
        return None
    return multiple_choice(rng, "general", "recognition", "Which of these is in the picture?", region.name, wrong)


def _name_it(rng: Random, scene: Scene, split: str) -> Question | None:
    if len(scene.regions) != 1 or scene.kind == "lettering":
        return None
    return Question("general", "recognition", "What is shown in the picture?", scene.regions[0].name)


def _contains_text(rng: Random, scene: Scene, split: str) -> Question | None:
    if scene.kind not in ("objects", "lettering"):
        return None
    # asked of few pictures, so that those with text are half
    if not scene.texts and rng.random() > 0.4:
        return None
    if scene.kind == "lettering" and rng.random() > 0.3:
        return None
    return Question("general", "existence", "Is there any text in the picture?", "yes" if scene.texts else "no")


def _kind_of_thing(rng: Random, scene: Scene, split: str) -> Question | None:
    categories = [r.category for r in scene.regions]
    if len(categories) != 1 or categories[0] not in KINDS_OF_THING:
        return None
    answer = str(categories[0])
    near = {"fruit": {"plant"}, "plant": {"fruit"}}.get(answer, set())
    wrong = rng.sample([k for k in KINDS_OF_THING if k != answer and k not in near], 3)
    return multiple_choice(rng, "knowledge", "category", "What kind of thing is shown in the picture?", answer, wrong)


def _category_present(rng: Random, scene: Scene, split: str) -> Question | None:
    present = {r.category for r in scene.regions}
    if None in present or not present:
        return None
    yes = [name for name, (members, _) in SUPER.items() if members & present]
    no = [name for name, (members, near) in SUPER.items() if not (members | near) & present]
    if not yes or not no:
        return None
    answer = rng.choice(("yes", "no"))
    asked = rng.choice(yes) if answer == "yes" else rng.choices(no, [ABSENT_WEIGHTS[name] for name in no])[0]
    return Question("knowledge", "category", f"Is there {asked} in the picture?", answer)


def _fact(rng: Random, scene: Scene, split: str) -> Question | None:
    """ "Which of the things in the picture ...?", where it is true of exactly one and surely false of the others."""
    regions = {r.name: r for r in scene.regions}
    if len(regions) < 2 or scene.kind == "lettering":
        return None
    fitting = []
    for wording, (true, false) in FACTS.items():
        yes = [n for n in regions if n in true]
        if len(yes) == 1 and all(n in true or regions[n].category in false for n in regions):
            fitting.append((wording, yes[0]))
    if not fitting:
        return None
    wording, answer = rng.choice(fitting)
    return Question("knowledge", "fact", f"Which of the things in the picture {wording}?", answer)


def _odd_one_out(rng: Random, scene: Scene, split: str) -> Question | None:
    regions = {r.name: r.category for r in scene.regions}
    counts = Counter(regions.values())
    if len(regions) < 3 or None in counts or len(counts) != 2 or min(counts.values()) != 1 or scene.kind == "lettering":
        return None
    families = [m for m, _ in SUPER.values()]
    if any(set(counts) <= family for family in families):  # a bird among animals is not odd
        return None
    if set(counts) & {"plant", "fruit", "vegetable", "food", "sweet food"} == set(counts):
        return None
    rare = next(c for c, n in counts.items() if n == 1)
    return Question(
        "knowledge",
        "odd_one_out",
        "Which thing in the picture does not belong with the others?",
        next(n for n, c in regions.items() if c == rare),
    )


def _read_all(rng: Random, scene: Scene, split: str) -> Question | None:
    if len(scene.texts) != 1:
        return None
    return Question("ocr_chart", "reading", "What is written in the picture?", scene.texts[0].text)


def _read_by_color(rng: Random, scene: Scene, split: str) -> Question | None:
    near = {"blue": "dark blue", "dark blue": "black", "red": "brown", "yellow": "orange", "pink": "purple"}
    colors = [t.color for t in scene.texts]
    unique = [t for t in scene.texts if colors.count(t.color) == 1]
    if len(scene.texts) < 2 or not unique:
        return None
    text = rng.choice(unique)
    if any(near.get(str(text.color)) == c or near.get(str(c)) == text.color for c in colors):
        return None
    return Question("ocr_chart", "reading", f"What does the {text.color} text say?", text.text)


def _read_by_place(rng: Random, scene: Scene, split: str) -> Question | None:
    if len(scene.texts) < 2:
        return None
    size = scene.image.size[1]
    order = sorted(scene.texts, key=lambda t: _center(t)[1])
    if rng.random() < 0.5:
        order, word = order[::-1], "bottom"
    else:
        word = "top"
    if abs(_center(order[0])[1] - _center(order[1])[1]) < 0.15 * size:
        return None
    return Question("ocr_chart", "reading", f"Which text is nearest to the {word} of the picture?", order[0].text)


def _contains_word(rng: Random, scene: Scene, split: str) -> Question | None:
    shown = [t.text for t in scene.texts if t.text.isalpha()]
    if not shown:
        return None
    word = rng.choice(shown)
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        lower = {t.lower() for t in shown}
        pool = [w for w in assets.words(split) if len(w) == len(word) and w not in lower]
        if not pool:
            return None
        word = rng.choice(pool)
    return Question("ocr_chart", "existence", f'Is the word "{word.lower()}" written in the picture?', answer)


def _count_words(rng: Random, scene: Scene, split: str) -> Question | None:
    if scene.kind != "lettering":
        return None
    return Question("ocr_chart", "counting", "How many pieces of text are in the picture?", str(len(scene.texts)))


def _count(rng: Random, scene: Scene, split: str) -> Question | None:
    counts = Counter(r.name for r in scene.regions)
    names = [n for n in counts if all(s.countable for s in _sprites_by_name().get(n, ()))]
    if not names or scene.kind == "lettering":
        return None
    repeated = [n for n in names if counts[n] > 1]
    name = rng.choice(repeated) if repeated and rng.random() < 0.75 else rng.choice(names)
    return Question(
        "vision_centric", "counting", f"How many {assets.plural(name)} are in the picture?", str(counts[name])
    )


def _count_all(rng: Random, scene: Scene, split: str) -> Question | None:
    if scene.kind != "objects" or any(assets.is_plural(r.name) or " and " in r.name for r in scene.regions):
        return None
    return Question(
        "vision_centric", "counting", "How many objects are in the picture, not counting text?", str(len(scene.regions))
    )


def _center(item: Region | Text) -> tuple[float, float]:
    return (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2


def _unique(scene: Scene) -> list[Region]:
    counts = Counter(r.name for r in scene.regions)
    return [r for r in scene.regions if counts[r.name] == 1]


def _relation(rng: Random, scene: Scene, split: str) -> Question | None:
    regions = _unique(scene)
    if len(regions) < 2:
        return None
    a, b = rng.sample(regions, 2)
    (ax, ay), (bx, by) = _center(a), _center(b)
    dx, dy = (ax - bx) / scene.image.width, (ay - by) / scene.image.height
    if max(abs(dx), abs(dy)) < 0.18 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        word, truth = rng.choice((("to the left of", dx < 0), ("to the right of", dx > 0)))
    else:
        word, truth = rng.choice((("above", dy < 0), ("below", dy > 0)))
    verb = "Are" if with_article(a.name) == a.name else "Is"
    return Question("vision_centric", "spatial", f"{verb} the {a.name} {word} the {b.name}?", "yes" if truth else "no")


def _extreme_place(rng: Random, scene: Scene, split: str) -> Question | None:
    regions = _unique(scene)
    if len(regions) < 2 or len(regions) != len(scene.regions):
        return None
    word, axis, sign = rng.choice(
        (("left edge", 0, 1), ("right edge", 0, -1), ("top edge", 1, 1), ("bottom edge", 1, -1))
    )
    order = sorted(regions, key=lambda r: sign * _center(r)[axis])
    if abs(_center(order[0])[axis] - _center(order[1])[axis]) < 0.15 * scene.image.width:
        return None
    return Question(
        "vision_centric", "spatial", f"Which object is nearest to the {word} of the picture?", order[0].name
    )


def _larger(rng: Random, scene: Scene, split: str) -> Question | None:
    regions = _unique(scene)
    if len(regions) < 2:
        return None
    a, b = rng.sample(regions, 2)
    areas = [(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]) for r in (a, b)]
    if max(areas) < 1.9 * min(areas):
        return None
    answer, other = (a, b) if areas[0] > areas[1] else (b, a)
    return multiple_choice(
        rng, "vision_centric", "size", "Which object takes up more of the picture?", answer.name, [other.name]
    )


def _where(rng: Random, scene: Scene, split: str) -> Question | None:
    regions = [r for r in _unique(scene) if r.box[2] - r.box[0] < 0.5 * scene.image.width]
    if not regions:
        return None
    region = rng.choice(regions)
    x, y = (v / scene.image.width for v in _center(region))
    if min(abs(x - 0.5), abs(y - 0.5)) < 0.1:
        return None
    answer = f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    wrong = [w for w in ("top left", "top right", "bottom left", "bottom right") if w != answer]
    verb = "are" if with_article(region.name) == region.name else "is"
    return multiple_choice(
        rng, "vision_centric", "spatial", f"In which part of the picture {verb} the {region.name}?", answer, wrong
    )


_ASKERS: dict[str, tuple[Callable[[Random, Scene, str], Question | None], ...]] = {
    "general": (_existence, _which_is_shown, _name_it, _contains_text),
    "knowledge": (_kind_of_thing, _category_present, _fact, _odd_one_out),
    "ocr_chart": (_read_all, _read_by_color, _read_by_place, _contains_word, _count_words),
    "vision_centric": (_count, _count_all, _relation, _extreme_place, _larger, _where),
}


def ask(scene: Scene, rng: Random, split: str) -> list[Question]:
    """Up to `PER_GROUP` questions of each group about objects or lettering; documents and charts bring their own."""
    if scene.kind not in ("single", "objects", "lettering"):
        return []
    out: list[Question] = []
    for group, askers in _ASKERS.items():
        if not scene.regions and group != "ocr_chart" and group != "general":
            continue
        order = list(askers)
        rng.shuffle(order)
        kept = 0
        for asker in order:
            if kept == PER_GROUP:
                break
            if not scene.regions and asker in (_existence, _which_is_shown, _name_it):
                continue
            question = asker(rng, scene, split)
            if question is not None:
                out.append(question)
                kept += 1
    return out
