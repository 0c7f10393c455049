"""Bar, line, pie and scatter charts of small tables, real or invented, drawn with PIL; questions ask for the table."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random
from statistics import correlation

from PIL import Image, ImageDraw

from florence_vl_mini.scenes import assets, draw, tables
from florence_vl_mini.scenes.annotations import Question, Region, Scene
from florence_vl_mini.scenes.documents import CITIES, GOODS, MONTHS, Sheet, is_kind

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


def _heading(sheet: Sheet, size: int, title: str, note: str = "") -> None:
    """The title, and under it in small print what the numbers are."""
    u = size / 256
    sheet.write(size / 2, 8 * u, title, tables.fit([title], 244 * u, 24 * u, 18 * u, True), bold=True, anchor="m")
    if note:
        sheet.write(size / 2, 35 * u, note, round(14 * u), anchor="m")


def _compare(
    rng: Random, labels: list[str], values: list[float], what: str, gap: float | None = None
) -> list[Question]:
    """Extremes and one comparison; `gap` is how far apart numbers must be, by default 2 or a twelfth."""
    questions = []
    if gap is None:
        gap = max(2, max(values) // 12)
    order = sorted(values)
    if order[-1] - order[-2] >= gap:
        questions.append(
            Question(
                "ocr_chart", "chart_extreme", f"Which {what} has the highest value?", labels[values.index(order[-1])]
            )
        )
    if order[1] - order[0] >= gap:
        questions.append(
            Question(
                "ocr_chart", "chart_extreme", f"Which {what} has the lowest value?", labels[values.index(order[0])]
            )
        )
    i, j = rng.sample(range(len(labels)), 2)
    if abs(values[i] - values[j]) >= gap:
        answer = "yes" if values[i] > values[j] else "no"
        questions.append(
            Question(
                "ocr_chart", "chart_compare", f"Is the value of {labels[i]} higher than that of {labels[j]}?", answer
            )
        )
    return questions


def bar(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A bar chart with the value over each bar."""
    u = size / 256
    real = rng.random() < tables.SHARE
    if real:
        shown = tables.pick(
            rng,
            split,
            ("groups", "series", "parts"),
            (3, 5),
            lambda label, n: assets.sans(round(14 * u)).getlength(label) <= 236 * u / n - 3 * u,
        )
    else:
        n = rng.randint(3, 5)
        shown = tables.Series(
            labels=_labels(rng, n), texts=[str(rng.randint(3, 99)) for _ in range(n)], title=rng.choice(TOPICS)
        )
    labels, values, topic, n = shown.labels, shown.values, shown.title, len(shown.labels)
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    _heading(sheet, size, topic, shown.note)
    base, top, left = size - 34 * u, (76 if real else 62) * u, 10 * u
    width = (size - 2 * left) / n
    colors = rng.sample(PALETTE, n) if rng.random() < 0.5 else [rng.choice(PALETTE)] * n
    regions = []
    label_size = tables.fit(labels, width - 3 * u, (19 if n <= 4 else 16) * u, 14 * u)
    tops = [base - (base - top) * v / max(values) for v in values]
    for i, (text, color) in enumerate(zip(shown.texts, colors, strict=True)):
        x = left + width * i
        box = (x + width * 0.16, tops[i], x + width * 0.84, base)
        ink.rectangle(box, fill=draw.COLORS[color])
        regions.append(Region("bar", f"{color} bar", box))
        sheet.write(x + width / 2, tops[i] - 19 * u, text, round(18 * u), anchor="m")
    for i, label in enumerate(labels):
        sheet.write(left + width * (i + 0.5), base + 9 * u, label, label_size, anchor="m")
    ink.line((left, base, size - left, base), fill=(0, 0, 0), width=max(1, round(2 * u)))
    i = rng.randrange(n)
    questions = [
        Question("ocr_chart", "chart_value", f"What is the value of {labels[i]}?", shown.texts[i]),
        Question("ocr_chart", "reading", "What is the title of the chart?", topic),
        Question("ocr_chart", "counting", "How many bars does the chart have?", str(n)),
        *_compare(rng, labels, values, "bar", max(values) / 20 if real else None),
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
        [*questions, *is_kind(rng, "bar chart")],
    )


def _invented_line(rng: Random) -> tables.Series:
    n, start = rng.randint(4, 5), rng.randrange(12)
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
    return tables.Series(rng.choice(TOPICS), labels, [str(v) for v in values])


def _course(values: list[float]) -> tuple[str, str]:
    """("rises", "falls" or "mixed", the word for it); steps too small to be seen are no turns."""
    steps = [b - a for a, b in pairwise(values)]
    plain = 0.03 * (max(values) - min(values))
    signs = [s > 0 for s in steps if abs(s) > plain]
    turns = sum(a != b for a, b in pairwise(signs))
    if turns:
        return "mixed", "zigzag" if turns > 1 else "bent"
    trend = ("rises" if signs[0] else "falls") if len(signs) == len(steps) else "mixed"
    return trend, "rising" if signs[0] else "falling"


def line(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A line chart with marked points and their values."""
    u = size / 256
    real = rng.random() < tables.SHARE
    shown = tables.pick(rng, split, ("series",), (4, 5), lambda *_: True) if real else _invented_line(rng)
    labels, values, topic, n = shown.labels, shown.values, shown.title, len(shown.labels)
    trend, word = _course(values)
    color = rng.choice(("red", "green", "blue", "orange", "purple", "brown"))
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    _heading(sheet, size, topic, shown.note)
    base, top, left = size - 36 * u, (80 if real else 66) * u, 12 * u
    width = (size - 2 * left) / n
    low, high = min(values), max(values)
    points = [
        (left + width * (i + 0.5), base - 8 * u - (base - top - 8 * u) * (v - low) / (high - low))
        for i, v in enumerate(values)
    ]
    ink.line((left, base, size - left, base), fill=(0, 0, 0), width=max(1, round(2 * u)))
    ink.line(points, fill=draw.COLORS[color], width=max(2, round(4 * u)), joint="curve")
    for (x, y), text in zip(points, shown.texts, strict=True):
        r = 5 * u
        ink.ellipse((x - r, y - r, x + r, y + r), fill=draw.COLORS[color])
        sheet.write(x, y - 25 * u, text, round(17 * u), anchor="m", halo=round(3 * u))
    for i, label in enumerate(labels):
        sheet.write(left + width * (i + 0.5), base + 10 * u, label, round(17 * u), anchor="m")
    i = rng.randrange(n)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    questions = [
        Question("ocr_chart", "chart_value", f"What is the value in {labels[i]}?", shown.texts[i]),
        Question("ocr_chart", "reading", "What is the title of the chart?", topic),
        Question("vision_centric", "color", "What is the color of the line?", color),
        *_compare(rng, labels, values, "point", (high - low) / 12 if real else None),
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
    return Scene(
        scene_id,
        "line_chart",
        sheet.image,
        "a line chart",
        f"A line chart with a {word} {color} line through {assets.NUMBERS[n]} points and a title at the top.",
        [Region("line", f"{word} {color} line", (min(xs), min(ys), max(xs), max(ys)))],
        sheet.texts,
        [*questions, *is_kind(rng, "line chart")],
    )


def _invented_pie(rng: Random) -> tables.Series:
    n = rng.randint(3, 4)
    while True:
        cuts = sorted(rng.sample(range(2, 19), n - 1))
        shares = [5 * (b - a) for a, b in zip([0, *cuts], [*cuts, 20], strict=True)]
        if min(shares) >= 10:
            break
    return tables.Series(labels=_labels(rng, n), texts=[str(s) for s in shares], title=rng.choice(TOPICS))


def pie(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A pie chart of three to five shares, with a legend that gives the percentages."""
    u = size / 256
    if rng.random() < tables.SHARE:
        small = assets.sans(round(13 * u))
        shown = tables.pick(rng, split, ("parts",), (3, 5), lambda label, _: small.getlength(f"{label} 88%") <= 87 * u)
    else:
        shown = _invented_pie(rng)
    labels, shares, topic, n = shown.labels, shown.values, shown.title, len(shown.labels)
    colors = rng.sample(PALETTE, n)
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    _heading(sheet, size, topic)  # the legend says percent
    box = (8 * u, 70 * u, 138 * u, 200 * u)
    angle = -90.0
    for share, color in zip(shares, colors, strict=True):
        ink.pieslice(box, angle, angle + 3.6 * share, fill=draw.COLORS[color], outline=(255, 255, 255))
        angle += 3.6 * share
    y = 78 * u
    lines = [f"{label} {text}%" for label, text in zip(labels, shown.texts, strict=True)]
    legend_size = tables.fit(lines, 87 * u, 15 * u, 13 * u)
    for text, color in zip(lines, colors, strict=True):
        ink.rectangle((148 * u, y, 162 * u, y + 14 * u), fill=draw.COLORS[color])
        sheet.write(167 * u, y, text, legend_size)
        y += 30 * u
    i = rng.randrange(n)
    questions = [
        Question("ocr_chart", "chart_value", f"What is the share of {labels[i]}, in percent?", shown.texts[i]),
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
        [*questions, *is_kind(rng, "pie chart")],
    )


Points = list[tuple[float, float]]


def _invented_points(rng: Random, colors: list[str], frame: tuple[float, ...], gap: float) -> tuple[list[Points], int]:
    """Points of each color along a slope, `gap` apart; and the slope, 1 or -1."""
    left, top, right, base = frame
    u = gap / 15
    slope = rng.choice((-1, 1))
    groups: list[Points] = []
    for k, n in enumerate([rng.randint(4, 9) for _ in colors]):
        mine: Points = []
        groups.append(mine)
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
            if all(math.hypot(x - a, y - b) > gap for group in groups for a, b in group):
                mine.append((x, y))
    return groups, slope


def _real_points(numbers: Points, frame: tuple[float, ...], gap: float) -> tuple[Points, int]:
    """Where the numbers lie, without those that would cover another; and 1, -1, or 0 where no trend is plain."""
    left, top, right, base = frame
    u = gap / 15
    xs, ys = [p[0] for p in numbers], [p[1] for p in numbers]
    placed: Points = []
    kept: Points = []
    for x, y in numbers:
        spot = (
            left + 14 * u + (right - left - 28 * u) * (x - min(xs)) / (max(xs) - min(xs)),
            base - 14 * u - (base - top - 26 * u) * (y - min(ys)) / (max(ys) - min(ys)),
        )
        if all(math.dist(spot, other) > gap for other in placed):
            placed.append(spot)
            kept.append((x, y))
    xs, ys = [p[0] for p in kept], [p[1] for p in kept]
    r = correlation(xs, ys) if len(kept) > 3 and len(set(xs)) > 1 and len(set(ys)) > 1 else 0.0
    return placed, 0 if abs(r) < 0.75 else 1 if r > 0 else -1


def scatter(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A scatter plot of one or two groups of points."""
    u = size / 256
    real = rng.random() < tables.SHARE / 2  # few tables have two measures
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS["white"]))
    ink = ImageDraw.Draw(sheet.image)
    topic, note, numbers = tables.pick_points(rng, split) if real else (rng.choice(TOPICS), "", [])
    _heading(sheet, size, topic, note)
    frame = left, top, right, base = 16 * u, (54 if real else 44) * u, 244 * u, 240 * u
    ink.line((left, top, left, base, right, base), fill=(0, 0, 0), width=max(1, round(2 * u)))
    colors = rng.sample(("red", "green", "blue", "orange", "purple"), 1 if real else rng.choice((1, 2)))
    if real:
        points, slope = _real_points(numbers, frame, 15 * u)
        groups = [points]
    else:
        groups, slope = _invented_points(rng, colors, frame, 15 * u)
    regions = []
    r = 5.5 * u
    for color, mine in zip(colors, groups, strict=True):
        for x, y in mine:
            ink.ellipse((x - r, y - r, x + r, y + r), fill=draw.COLORS[color])
        xs, ys = [p[0] for p in mine], [p[1] for p in mine]
        regions.append(Region("points", f"{color} points", (min(xs) - r, min(ys) - r, max(xs) + r, max(ys) + r)))
    asked = rng.choice(("rise", "fall"))
    other = rng.choice([c for c in ("red", "green", "blue", "orange", "purple") if c not in colors])
    present = rng.random() < 0.5
    questions = [
        Question("ocr_chart", "reading", "What is the title of the chart?", topic),
        Question("vision_centric", "counting", f"How many {colors[0]} points are there?", str(len(groups[0]))),
        Question(
            "vision_centric",
            "existence",
            f"Are there {rng.choice(colors) if present else other} points in the chart?",
            "yes" if present else "no",
        ),
    ]
    if slope:
        answer = "yes" if (asked == "rise") == (slope > 0) else "no"
        questions.append(Question("ocr_chart", "chart_trend", f"Do the points {asked} from left to right?", answer))
    course = {1: "rise from left to right", -1: "fall from left to right", 0: "lie scattered"}[slope]
    return Scene(
        scene_id,
        "scatter_chart",
        sheet.image,
        "a scatter chart",
        f"A scatter chart of {' and '.join(colors)} points that {course}, with a title at the top.",
        regions,
        sheet.texts,
        [*questions, *is_kind(rng, "scatter chart")],
    )
