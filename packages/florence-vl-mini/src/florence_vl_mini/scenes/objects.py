"""Pictures of objects: one alone, or several side by side with exact boxes, sometimes with a word."""

from __future__ import annotations

from collections import Counter
from random import Random

from PIL import Image

from florence_vl_mini.scenes import assets, draw
from florence_vl_mini.scenes.annotations import Box, Region, Scene, Text
from florence_vl_mini.scenes.assets import Sprite

LARGE, SMALL = 0.36, 0.2  # longer side / picture side; between the two an object is neither


def position(box: Box, size: int) -> str:
    """ "at the top left", "in the center", ...: the cell of a 3 x 3 grid that holds the box's center."""
    column = min(2, int((box[0] + box[2]) / 2 * 3 / size))
    row = min(2, int((box[1] + box[3]) / 2 * 3 / size))
    names = (
        ("at the top left", "at the top", "at the top right"),
        ("on the left", "in the center", "on the right"),
        ("at the bottom left", "at the bottom", "at the bottom right"),
    )
    return names[row][column]


def enumerate_words(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def choose(rng: Random, split: str, n: int) -> list[Sprite]:
    """`n` sprites whose names do not get in each other's way."""
    pool = assets.sprites(split)
    chosen: list[Sprite] = []
    if n > 1 and rng.random() < 0.4:  # of one category: harder to tell apart by guessing
        pool = rng.choice([g for g in assets.by_category(split).values() if len(g) >= 6])
    for _ in range(60):
        if len(chosen) == n:
            break
        sprite = rng.choice(pool)
        if not any(sprite.conflicts(other) for other in chosen):
            chosen.append(sprite)
    return chosen


def single(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """One object, large, somewhere near the middle."""
    sprite = rng.choice(assets.sprites(split))
    canvas, ground = draw.background(rng, size)
    image = draw.sprite_at(rng, sprite.id, round(size * rng.uniform(0.45, 0.9)))
    free_x, free_y = size - image.width, size - image.height
    x, y = round(free_x * rng.uniform(0.2, 0.8)), round(free_y * rng.uniform(0.2, 0.8))
    canvas.paste(image, (x, y), image)
    box = (float(x), float(y), float(x + image.width), float(y + image.height))
    name = assets.with_article(sprite.name)
    place = f" on a {ground} background" if ground else " on a patterned background"
    return Scene(
        scene_id,
        "single",
        canvas,
        caption=name,
        detailed_caption=f"A picture of {name}{place}.",
        regions=[Region(sprite.name, f"large {sprite.name}", box, sprite.category)],
    )


def arrangement(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """One to six objects that do not overlap; some kinds appear more than once; perhaps one word of text."""
    canvas, ground = draw.background(rng, size)
    kinds = choose(rng, split, rng.choice((1, 2, 2, 3, 3, 4)))
    wanted: list[Sprite] = []
    for sprite in kinds:
        repeat = rng.choice((2, 2, 3, 4)) if sprite.countable and rng.random() < 0.25 else 1
        wanted += [sprite] * repeat
    wanted = wanted[:6]
    rng.shuffle(wanted)
    taken: list[Box] = []
    found: list[tuple[Sprite, Region]] = []
    limit = {1: 0.7, 2: 0.48, 3: 0.42, 4: 0.36, 5: 0.32, 6: 0.3}[len(wanted)]
    for sprite in wanted:
        share = rng.uniform(0.17, limit)
        image = draw.sprite_at(rng, sprite.id, round(size * share))
        spot = draw.place(rng, size, image.width, image.height, taken, gap=size / 64)
        if spot is None:
            continue
        canvas.paste(image, spot, image)
        box = (float(spot[0]), float(spot[1]), float(spot[0] + image.width), float(spot[1] + image.height))
        taken.append(box)
        longest = max(image.size) / size
        word = "large " if longest > LARGE else "small " if longest < SMALL else ""
        found.append((sprite, Region(sprite.name, word + sprite.name, box, sprite.category)))
    texts = []
    if rng.random() < 0.3 and (line := add_text(rng, canvas, rng.choice(assets.words(split)), taken, size)):
        texts.append(line)
    found.sort(key=lambda pair: (pair[1].box[0], pair[1].box[1]))
    regions = [region for _, region in found]
    counts = Counter(r.name for r in regions)
    names = [assets.counted(name, n) for name, n in counts.items()]
    caption = enumerate_words(names) + (" with text" if texts else "")
    where = f"on a {ground} background" if ground else "on a patterned background"
    parts = [f"{assets.with_article(r.description)} {position(r.box, size)}" for r in regions]
    detailed = f"A picture of {enumerate_words(parts)}, {where}."
    if texts:
        detailed += f" There is {texts[0].color} text {position(texts[0].box, size)}."
    return Scene(scene_id, "objects", canvas, caption, detailed, regions, texts)


def add_text(
    rng: Random,
    canvas: Image.Image,
    text: str,
    taken: list[Box],
    size: int,
    share: tuple[float, float] = (0.1, 0.17),
    tilt: float = 0.15,
) -> Text | None:
    """Write `text` where nothing is yet, in a color that stands out; None where there is no such place.

    Args:
        taken: Boxes in use; the text's box is appended.
        share: Range of the font size relative to the picture's side.
        tilt: Chance of turning the line by up to 25 degrees.
    """
    font = assets.font(rng.choice(assets.font_files()), max(9, round(size * rng.uniform(*share))))
    angle = rng.uniform(-25, 25) if rng.random() < tilt else 0.0
    layer, quad = draw.text_layer(text, font, (0, 0, 0), angle)
    spot = draw.place(rng, size, layer.width, layer.height, taken, gap=size / 64)
    if spot is None:
        return None
    box = (float(spot[0]), float(spot[1]), float(spot[0] + layer.width), float(spot[1] + layer.height))
    color = draw.readable_color(rng, canvas, box)
    if color is None:  # on a mixed ground: a plate under the text
        plate = rng.choice(("white", "light yellow", "black", "dark blue"))
        canvas.paste(draw.COLORS[plate], tuple(int(v) for v in box))  # type: ignore[arg-type]
        color = draw.readable_color(rng, canvas, box)
        if color is None:
            return None
    layer, quad = draw.text_layer(text, font, color[1], angle)
    canvas.paste(layer, spot, layer)
    taken.append(box)
    quad = tuple(min(max(v + spot[i % 2], 0.0), float(size)) for i, v in enumerate(quad))
    return Text(text, quad, color[0])


def lettering(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """One to four words in different fonts, sizes, colors and angles, perhaps beside an object."""
    canvas, ground = draw.background(rng, size, busy=0.45)
    taken: list[Box] = []
    regions = []
    if rng.random() < 0.3:
        sprite = rng.choice(assets.sprites(split))
        image = draw.sprite_at(rng, sprite.id, round(size * rng.uniform(0.2, 0.4)))
        spot = draw.place(rng, size, image.width, image.height, taken, gap=0)
        if spot:
            canvas.paste(image, spot, image)
            box = (float(spot[0]), float(spot[1]), float(spot[0] + image.width), float(spot[1] + image.height))
            taken.append(box)
            regions.append(Region(sprite.name, sprite.name, box, sprite.category))
    texts: list[Text] = []
    n = rng.choice((1, 1, 2, 2, 3, 4))
    for _ in range(n):
        share = (0.14, 0.26) if n <= 2 else (0.1, 0.17)
        word = text_content(rng, split)
        line = add_text(rng, canvas, word, taken, size, share, tilt=0.25) or add_text(
            rng, canvas, word, taken, size, (0.09, 0.13)
        )
        if line:
            texts.append(line)
    if not texts:  # a long word beside a large object: start from an empty canvas, where a word always fits
        canvas, ground = draw.background(rng, size, busy=0.0)
        taken, regions = [], []
        line = add_text(rng, canvas, text_content(rng, split)[:6], taken, size, (0.12, 0.14), tilt=0)
        assert line is not None
        texts.append(line)
    texts.sort(key=lambda t: (t.box[1] // (size / 8), t.box[0]))
    things = [assets.with_article(r.name) for r in regions]
    amount = "one word" if len(texts) == 1 else f"{assets.NUMBERS[len(texts)]} words"
    where = f"on a {ground} background" if ground else "on a patterned background"
    parts = [f"{t.color} text {position(t.box, size)}" for t in texts]
    parts += [f"{assets.with_article(r.name)} {position(r.box, size)}" for r in regions]
    return Scene(
        scene_id,
        "lettering",
        canvas,
        caption=enumerate_words([*things, amount]),
        detailed_caption=f"A picture of {enumerate_words(parts)}, {where}.",
        regions=regions,
        texts=texts,
    )


def text_content(rng: Random, split: str) -> str:
    """A word in lower, title or upper case, or a number, price or date."""
    kind = rng.random()
    if kind < 0.72:
        word = rng.choice(assets.words(split))
        return rng.choice((word, word.capitalize(), word.upper()))
    if kind < 0.86:
        return str(rng.randint(0, 10 ** rng.randint(1, 4)))
    if kind < 0.94:
        return f"${rng.randint(1, 99)}.{rng.choice((0, 25, 49, 50, 75, 95, 99)):02d}"
    return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"
