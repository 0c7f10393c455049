"""Bar, line and pie charts of small tables, drawn with PIL; the questions are answered from the table."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

from florence_vl.data.scenes import assets, draw
from florence_vl.data.scenes.annotations import Question, Region, Scene
from florence_vl.data.scenes.documents import CITIES, GOODS, MONTHS, Sheet, _is_kind

PALETTE = ("red", "green", "blue", "orange", "purple", "yellow", "brown", "pink")
TOPICS = ("Sales", "Visitors", "Rain", "Books", "Trees", "Scores", "Orders", "Profit", "Votes", "Birds")


def _labels(rng: Random, n: int) -> list[str]:
    kind = rng.randrange(4)
    if kind == 0:
        start = rng.randrange(12)
        return [MONTHS[(start + i) % 12] for i in range(n)]
    if kind == 1:
        start = rng.randint(1990, 2022)
        return [str(start + i) for i in range(n)]
    return rng.sample([w for w in (CITIES if kind == 2 else [g.title() for g in GOODS]) if len(w) <= 6], n)


def _compare(rng: Random, labels: list[str], values: list[int], what: str) -> list[Question]:
    questions = []
    order = sorted(values)
    if order[-1] - order[-2] >= max(2, order[-1] // 12):
        questions.append(
            Question(
                "ocr_chart", "chart_extreme", f"Which {what} has the highest value?", labels[values.index(order[-1])]
            )
        )
    if order[1] - order[0] >= max(2, order[-1] // 12):
        questions.append(
            Question(
                "ocr_chart", "chart_extreme", f"Which {what} has the lowest value?", labels[values.index(order[0])]
            )
        )
    i, j = rng.sample(range(len(labels)), 2)
    if abs(values[i] - values[j]) >= max(2, order[-1] // 12):
        answer = "yes" if values[i] > values[j] else "no"
        questions.append(
            Question(
                "ocr_chart", "chart_compare", f"Is the value of {labels[i]} higher than that of {labels[j]}?", answer
            )
        )
    return questions


def bar(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A bar chart with the value over each bar."""
    u, n = size / 256, rng.randint(3, 5)
    labels, values = _labels(rng, n), [rng.randint(3, 99) for _ in range(n)]
    topic = rng.choice(TOPICS)
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    sheet.write(size / 2, 8 * u, topic, round(24 * u), bold=True, anchor="m")
    base, top, left = size - 34 * u, 62 * u, 10 * u
    width = (size - 2 * left) / n
    colors = rng.sample(PALETTE, n) if rng.random() < 0.5 else [rng.choice(PALETTE)] * n
    regions = []
    label_size = round((19 if n <= 4 else 16) * u)
    tops = [base - (base - top) * v / max(values) for v in values]
    for i, (value, color) in enumerate(zip(values, colors, strict=True)):
        x = left + width * i
        box = (x + width * 0.16, tops[i], x + width * 0.84, base)
        ink.rectangle(box, fill=draw.COLORS[color])
        regions.append(Region("bar", f"{color} bar", box))
        sheet.write(x + width / 2, tops[i] - 19 * u, str(value), round(18 * u), anchor="m")
    for i, label in enumerate(labels):
        sheet.write(left + width * (i + 0.5), base + 9 * u, label, label_size, anchor="m")
    ink.line((left, base, size - left, base), fill=(0, 0, 0), width=max(1, round(2 * u)))
    i = rng.randrange(n)
    questions = [
        Question("ocr_chart", "chart_value", f"What is the value of {labels[i]}?", str(values[i])),
        Question("ocr_chart", "reading", "What is the title of the chart?", topic),
        Question("ocr_chart", "counting", "How many bars does the chart have?", str(n)),
        *_compare(rng, labels, values, "bar"),
    ]
    if len(set(colors)) == n:
        questions.append(
            Question("vision_centric", "color", f"What is the color of the bar of {labels[i]}?", colors[i])
        )
    return Scene(
        scene_id,
        "bar_chart",
        sheet.image,
        "a bar chart",
        f"A bar chart with {assets.NUMBERS[n]} bars and a title at the top.",
        regions,
        sheet.texts,
        [*questions, *_is_kind(rng, "bar chart", topic)],
    )


def line(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A line chart with marked points and their values."""
    u, n = size / 256, rng.randint(4, 5)
    start = rng.randrange(12)
    labels = (
        [MONTHS[(start + i) % 12] for i in range(n)]
        if rng.random() < 0.5
        else [str(2000 + start + i) for i in range(n)]
    )
    trend = rng.choice(("rises", "falls", "mixed"))
    values = rng.sample(range(5, 99), n)
    if trend != "mixed":
        values.sort(reverse=trend == "falls")
    elif values in (sorted(values), sorted(values, reverse=True)):
        values[0], values[1] = values[1], values[0]
    topic, color = rng.choice(TOPICS), rng.choice(("red", "green", "blue", "orange", "purple", "brown"))
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    sheet.write(size / 2, 8 * u, topic, round(24 * u), bold=True, anchor="m")
    base, top, left = size - 36 * u, 66 * u, 12 * u
    width = (size - 2 * left) / n
    low, high = min(values), max(values)
    points = [
        (left + width * (i + 0.5), base - 8 * u - (base - top - 8 * u) * (v - low) / max(1, high - low))
        for i, v in enumerate(values)
    ]
    ink.line((left, base, size - left, base), fill=(0, 0, 0), width=max(1, round(2 * u)))
    ink.line(points, fill=draw.COLORS[color], width=max(2, round(4 * u)), joint="curve")
    for (x, y), value in zip(points, values, strict=True):
        r = 5 * u
        ink.ellipse((x - r, y - r, x + r, y + r), fill=draw.COLORS[color])
        sheet.write(x, y - 25 * u, str(value), round(17 * u), anchor="m", halo=round(3 * u))
    for i, label in enumerate(labels):
        sheet.write(left + width * (i + 0.5), base + 10 * u, label, round(17 * u), anchor="m")
    i = rng.randrange(n)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    questions = [
        Question("ocr_chart", "chart_value", f"What is the value in {labels[i]}?", str(values[i])),
        Question("ocr_chart", "reading", "What is the title of the chart?", topic),
        Question("vision_centric", "color", "What is the color of the line?", color),
        *_compare(rng, labels, values, "point"),
    ]
    if trend != "mixed":
        asked = rng.choice(("rises", "falls"))
        questions.append(
            Question(
                "ocr_chart",
                "chart_trend",
                f"Does the line {asked.removesuffix('s')} from left to right?",
                "yes" if asked == trend else "no",
            )
        )
    word = {"rises": "rising", "falls": "falling", "mixed": "zigzag"}[trend]
    return Scene(
        scene_id,
        "line_chart",
        sheet.image,
        "a line chart",
        f"A line chart with a {word} {color} line through {assets.NUMBERS[n]} points and a title at the top.",
        [Region("line", f"{word} {color} line", (min(xs), min(ys), max(xs), max(ys)))],
        sheet.texts,
        [*questions, *_is_kind(rng, "line chart", topic)],
    )


def pie(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A pie chart of three or four shares, with a legend that gives the percentages."""
    u, n = size / 256, rng.randint(3, 4)
    while True:
        cuts = sorted(rng.sample(range(2, 19), n - 1))
        shares = [5 * (b - a) for a, b in zip([0, *cuts], [*cuts, 20], strict=True)]
        if min(shares) >= 10:
            break
    labels, colors = _labels(rng, n), rng.sample(PALETTE, n)
    topic = rng.choice(TOPICS)
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    sheet.write(size / 2, 8 * u, topic, round(24 * u), bold=True, anchor="m")
    box = (8 * u, 70 * u, 138 * u, 200 * u)
    angle = -90.0
    for share, color in zip(shares, colors, strict=True):
        ink.pieslice(box, angle, angle + 3.6 * share, fill=draw.COLORS[color], outline=(255, 255, 255))
        angle += 3.6 * share
    y = 78 * u
    for label, share, color in zip(labels, shares, colors, strict=True):
        ink.rectangle((148 * u, y, 162 * u, y + 14 * u), fill=draw.COLORS[color])
        sheet.write(167 * u, y, f"{label} {share}%", round(15 * u))
        y += 30 * u
    i = rng.randrange(n)
    questions = [
        Question("ocr_chart", "chart_value", f"What is the share of {labels[i]}, in percent?", str(shares[i])),
        Question("ocr_chart", "counting", "How many parts does the pie have?", str(n)),
        Question("vision_centric", "color", f"What is the color of the part of {labels[i]}?", colors[i]),
        *_compare(rng, labels, shares, "part"),
    ]
    return Scene(
        scene_id,
        "pie_chart",
        sheet.image,
        "a pie chart",
        f"A pie chart with {assets.NUMBERS[n]} parts in {', '.join(colors[:-1])} and {colors[-1]}, "
        "with a legend on the right.",
        [Region("pie", f"pie of {assets.NUMBERS[n]} parts", box)],
        sheet.texts,
        [*questions, *_is_kind(rng, "pie chart", topic)],
    )


def scatter(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A scatter plot of one or two groups of points."""
    u = size / 256
    topic = rng.choice(TOPICS)
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    sheet.write(size / 2, 8 * u, topic, round(24 * u), bold=True, anchor="m")
    left, right, top, base = 16 * u, 244 * u, 44 * u, 240 * u
    ink.line((left, top, left, base, right, base), fill=(0, 0, 0), width=max(1, round(2 * u)))
    slope = rng.choice((-1, 1))
    colors = rng.sample(("red", "green", "blue", "orange", "purple"), rng.choice((1, 2)))
    counts = [rng.randint(4, 9) for _ in colors]
    spots: list[tuple[float, float]] = []
    regions = []
    for k, (color, n) in enumerate(zip(colors, counts, strict=True)):
        mine: list[tuple[float, float]] = []
        for _ in range(200):
            if len(mine) == n:
                break
            t = rng.random()
            x = left + 12 * u + t * (right - left - 24 * u)
            y0 = (1 - t if slope > 0 else t) * 0.8 + 0.1
            y = (
                top
                + 8 * u
                + (base - top - 20 * u) * min(max(y0 + rng.gauss(0, 0.06) + (0.12 * k if k else 0) * slope, 0.0), 1.0)
            )
            if all(math.hypot(x - a, y - b) > 15 * u for a, b in spots):
                spots.append((x, y))
                mine.append((x, y))
        counts[k] = len(mine)
        r = 5.5 * u
        for x, y in mine:
            ink.ellipse((x - r, y - r, x + r, y + r), fill=draw.COLORS[color])
        xs, ys = [p[0] for p in mine], [p[1] for p in mine]
        regions.append(Region("points", f"{color} points", (min(xs) - r, min(ys) - r, max(xs) + r, max(ys) + r)))
    asked = rng.choice(("rise", "fall"))
    other = rng.choice([c for c in ("red", "green", "blue", "orange", "purple") if c not in colors])
    present = rng.random() < 0.5
    questions = [
        Question("ocr_chart", "reading", "What is the title of the chart?", topic),
        Question(
            "ocr_chart",
            "chart_trend",
            f"Do the points {asked} from left to right?",
            "yes" if (asked == "rise") == (slope > 0) else "no",
        ),
        Question("vision_centric", "counting", f"How many {colors[0]} points are there?", str(counts[0])),
        Question(
            "vision_centric",
            "existence",
            f"Are there {rng.choice(colors) if present else other} points in the chart?",
            "yes" if present else "no",
        ),
    ]
    return Scene(
        scene_id,
        "scatter_chart",
        sheet.image,
        "a scatter chart",
        f"A scatter chart of {' and '.join(colors)} points that {'rise' if slope > 0 else 'fall'} from left to right, "
        "with a title at the top.",
        regions,
        sheet.texts,
        [*questions, *_is_kind(rng, "scatter chart", topic)],
    )
