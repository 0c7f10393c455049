"""Plain geometry: colored circles, squares, triangles, stars, arrows, lines and others, and questions about them."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

from PIL import Image, ImageDraw

from florence_vl_mini.scenes import assets, draw
from florence_vl_mini.scenes.annotations import Box, Question, Region, Scene, Text
from florence_vl_mini.scenes.objects import add_text, enumerate_words, position, text_content

# What people type in a drawing library, beside the softer colors of `draw.COLORS`.
PURE = {
    "red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "yellow": (255, 235, 0), "orange": (255, 150, 0),
    "purple": (128, 0, 128), "black": (0, 0, 0), "gray": (128, 128, 128), "pink": (255, 140, 190),
    "brown": (139, 69, 19), "white": (255, 255, 255), "light blue": (173, 216, 230),
}  # fmt: skip
INKS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "gray", "pink", "brown", "white")
GROUNDS = ("white", "white", "white", "light gray", "light blue", "light yellow", "black", "gray", "red", "green",
           "blue", "yellow", "orange", "purple", "pink", "dark blue")  # fmt: skip
ALIKE = ({"red", "orange", "brown"}, {"yellow", "orange", "light yellow"}, {"pink", "purple", "red"},
         {"white", "light gray", "light yellow", "light blue", "gray"}, {"black", "gray", "dark blue", "brown"},
         {"blue", "dark blue", "purple"}, {"gray", "light gray"}, {"green", "gray"})  # fmt: skip
SHAPES = ("circle", "square", "triangle", "rectangle", "star", "arrow", "line", "diamond", "heart", "cross")
SUPERSAMPLING = 4


def alike(a: str, b: str) -> bool:
    """Whether two colors are too near for a question that must tell them apart."""
    return a == b or any({a, b} <= group for group in ALIKE)


def mask(rng: Random, shape: str, side: int, outline: bool = False) -> Image.Image:
    """A shape as an antialiased mask ("L") trimmed to what it covers; `side` is about its longer side in pixels."""
    n = side * SUPERSAMPLING
    image = Image.new("L", (n, n), 0)
    ink = ImageDraw.Draw(image)
    width = max(SUPERSAMPLING * 2, n // 12)
    fill, line = (0, 255) if outline else (255, None)
    if shape == "circle":
        ink.ellipse((0, 0, n - 1, n - 1), fill=fill, outline=line, width=width)
    elif shape == "square":
        ink.rectangle((0, 0, n - 1, n - 1), fill=fill, outline=line, width=width)
    elif shape == "rectangle":
        short = n * rng.uniform(0.3, 0.62)
        box = (0, 0, n - 1, short) if rng.random() < 0.6 else (0, 0, short, n - 1)
        ink.rectangle(box, fill=fill, outline=line, width=width)
    elif shape == "line":
        thick = max(2 * SUPERSAMPLING, round(n * rng.uniform(0.03, 0.08)))
        ends = rng.choice((((0, 0.5), (1, 0.5)), ((0.5, 0), (0.5, 1)), ((0, 0), (1, 1)), ((0, 1), (1, 0))))
        ink.line([(x * (n - 1), y * (n - 1)) for x, y in ends], fill=255, width=thick)
    else:
        corners = [(x * (n - 1), y * (n - 1)) for x, y in _corners(shape)]
        if outline:
            ink.line([*corners, corners[0], corners[1]], fill=255, width=width, joint="curve")
        else:
            ink.polygon(corners, fill=255)
    if shape == "arrow":
        image = image.rotate(90 * rng.randrange(4))
    elif shape in ("triangle", "star", "square") and rng.random() < 0.15:
        image = image.rotate(rng.uniform(-20, 20), expand=True)
    image = image.resize((max(1, image.width // SUPERSAMPLING), max(1, image.height // SUPERSAMPLING)))
    covered = image.point([0] * 64 + [255] * 192).getbbox()
    return image.crop(covered) if covered else image


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 0.9), (0.0, 0.9)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)]
    if shape == "arrow":
        return [(0.0, 0.36), (0.56, 0.36), (0.56, 0.12), (1.0, 0.5), (0.56, 0.88), (0.56, 0.64), (0.0, 0.64)]
    if shape == "cross":
        a, b = 0.34, 0.66
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if shape == "star":
        return [
            (0.5 + r * math.sin(math.pi * i / 5), 0.5 - r * math.cos(math.pi * i / 5))
            for i, r in enumerate((0.5, 0.2) * 5)
        ]
    turn = [2 * math.pi * i / 48 for i in range(48)]  # heart
    return [
        (0.5 + math.sin(t) ** 3 / 2.02,
         0.46 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 34)
        for t in turn
    ]  # fmt: skip


def _color(rng: Random, name: str) -> tuple[int, int, int]:
    pure = PURE.get(name)
    return pure if pure is not None and rng.random() < 0.6 else draw.jitter(rng, draw.COLORS[name], 7)


def shapes(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """One to eight shapes in plain colors on a plain ground, sometimes many of one kind, sometimes a word."""
    ground = rng.choice(GROUNDS)
    canvas = Image.new("RGB", (size, size), _color(rng, ground))
    inks = [name for name in INKS if not alike(name, ground)]
    if rng.random() < 0.25:  # many of one kind, to be counted
        kinds = [(rng.choice(SHAPES[:6]), rng.choice(inks))] * rng.randint(2, 8)
        limit = 0.2
    else:
        kinds = [(rng.choice(SHAPES), rng.choice(inks)) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 3, 4)))]
        limit = {1: 0.75, 2: 0.46, 3: 0.38, 4: 0.32}[len(kinds)]
    outline = rng.random() < 0.12
    taken: list[Box] = []
    found: list[tuple[str, str, Box]] = []
    share = rng.uniform(0.1, limit)
    for shape, color in kinds:
        if limit > 0.2:
            share = rng.uniform(0.14, limit)
        layer = mask(rng, shape, max(8, round(size * share)), outline)
        spot = draw.place(rng, size, layer.width, layer.height, taken, gap=size / 64)
        if spot is None:
            continue
        canvas.paste(_color(rng, color), (*spot, spot[0] + layer.width, spot[1] + layer.height), layer)
        box = (float(spot[0]), float(spot[1]), float(spot[0] + layer.width), float(spot[1] + layer.height))
        taken.append(box)
        found.append((shape, color, box))
    texts: list[Text] = []
    if rng.random() < 0.25 and (line := add_text(rng, canvas, text_content(rng, split), taken, size, (0.08, 0.16))):
        texts.append(line)
    found.sort(key=lambda item: (item[2][0], item[2][1]))
    counts = Counter(f"{color} {shape}" for shape, color, _ in found)
    names = [assets.counted(name, n) for name, n in counts.items()]
    parts = [f"{assets.with_article(f'{color} {shape}')} {position(box, size)}" for shape, color, box in found]
    parts += [f"{t.color} text {position(t.box, size)}" for t in texts]
    return Scene(
        scene_id,
        "shapes",
        canvas,
        caption=enumerate_words(names) + (" with text" if texts else ""),
        detailed_caption=f"A picture of {enumerate_words(parts)}, on {assets.with_article(ground)} background.",
        regions=[Region(shape, f"{color} {shape}", box, "shape") for shape, color, box in found],
        texts=texts,
        questions=about_shapes(rng, found, ground, texts, size),
    )


def about_shapes(
    rng: Random, found: list[tuple[str, str, Box]], ground: str, texts: list[Text], size: int
) -> list[Question]:
    """Questions about shapes, colors, numbers and places.

    Args:
        rng: Source of every choice.
        found: Shape, color and box in pixels of each.
        ground: Color of the background.
        texts: What is written.
        size: Side of the picture in pixels.
    """
    shape, color, _ = rng.choice(found)
    by_shape, by_color = Counter(s for s, _, _ in found), Counter(c for _, c, _ in found)
    both = {(s, c) for s, c, _ in found}
    out = [
        Question("vision_centric", "color", "What color is the background?", ground),
        Question("vision_centric", "counting", "How many shapes are in the picture?", str(len(found))),
        Question("vision_centric", "counting", f"How many {assets.plural(shape)} are in the picture?",
                 str(by_shape[shape])),
    ]  # fmt: skip
    if by_shape[shape] == 1:
        out.append(Question("vision_centric", "color", f"What color is the {shape}?", color))
    if by_color[color] == 1 and not any(alike(color, other) for other in by_color if other != color):
        out.append(Question("general", "shape", f"What shape is {color}?", shape))
    if len(found) == 1:
        out += [
            Question("general", "shape", "What is shown in the picture?", f"{color} {shape}"),
            Question("general", "shape", "What shape is shown in the picture?", shape),
        ]
    elif 1 < len(by_shape) <= 3:
        names = list(dict.fromkeys(s for s, _, _ in found))
        out.append(Question("general", "shape", "Which shapes are in the picture?", ", ".join(names)))
    absent = [
        (s, c)
        for s, c in ((shape, rng.choice(INKS)), (rng.choice(SHAPES), color))
        if not any(s == there and alike(c, ink) for there, ink in both)
    ]
    if rng.random() < 0.5 or not absent:
        asked, answer = (shape, color), "yes"
    else:
        asked, answer = rng.choice(absent), "no"
    thing = assets.with_article(f"{asked[1]} {asked[0]}")
    out.append(Question("general", "existence", f"Is there {thing} in the picture?", answer))
    if len(found) > 1 and len(both) == len(found):
        out += _relation(rng, found, size)
        out += _extremes(rng, found, size)
    if len(texts) == 1:
        out.append(Question("ocr_chart", "reading", "What is written in the picture?", texts[0].text))
    return out


def _extremes(rng: Random, found: list[tuple[str, str, Box]], size: int) -> list[Question]:
    """The outermost shape on one side, and the largest, each by its color and its name."""
    out = []
    word, axis, sign = rng.choice((("on the left", 0, 1), ("on the right", 0, -1), ("at the top", 1, 1),
                                   ("at the bottom", 1, -1)))  # fmt: skip
    places = sorted((sign * (box[axis] + box[axis + 2]) / 2, i) for i, (_, _, box) in enumerate(found))
    areas = sorted(((box[2] - box[0]) * (box[3] - box[1]), i) for i, (_, _, box) in enumerate(found))
    if places[1][0] - places[0][0] > 0.15 * size:
        shape, color, _ = found[places[0][1]]
        out += [
            Question("vision_centric", "spatial", f"Which shape is {word}?", shape),
            Question("vision_centric", "color", f"What color is the shape {word}?", color),
        ]
    if areas[-1][0] > 1.6 * areas[-2][0]:
        shape, color, _ = found[areas[-1][1]]
        out.append(Question("vision_centric", "size", "Which shape is the largest?", shape))
    return out


def _relation(rng: Random, found: list[tuple[str, str, Box]], size: int) -> list[Question]:
    (a, a_color, a_box), (b, b_color, b_box) = rng.sample(found, 2)
    dx, dy = (((a_box[i] + a_box[i + 2]) - (b_box[i] + b_box[i + 2])) / 2 / size for i in (0, 1))
    if max(abs(dx), abs(dy)) < 0.18 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return []
    if abs(dx) > abs(dy):
        word, truth = rng.choice((("to the left of", dx < 0), ("to the right of", dx > 0)))
    else:
        word, truth = rng.choice((("above", dy < 0), ("below", dy > 0)))
    question = f"Is the {a_color} {a} {word} the {b_color} {b}?"
    return [Question("vision_centric", "spatial", question, "yes" if truth else "no")]
