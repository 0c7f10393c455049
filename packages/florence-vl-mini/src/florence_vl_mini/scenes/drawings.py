"""What people draw to try a model: shapes, signs, price lists, plain charts and dialogs on pages of any proportion."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

from florence_vl_mini.scenes import assets, draw
from florence_vl_mini.scenes.annotations import Box, Question, Scene
from florence_vl_mini.scenes.charts import PALETTE, TOPICS
from florence_vl_mini.scenes.documents import CITIES, FIRST, GOODS, MONTHS, is_kind
from florence_vl_mini.scenes.objects import enumerate_words, position
from florence_vl_mini.scenes.page import CSS, Page
from florence_vl_mini.scenes.screens import LABELS, TITLES
from florence_vl_mini.scenes.shapes import INKS, SHAPES, about_shapes, alike, mask

BUTTONS = ("red", "green", "blue", "gray", "orange", "purple", "black")
FIELDS = ("Name", "Email", "City", "Password", "Search", "Address", "Phone", "Comment", "First name", "Subject")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def drawing(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """One large shape, several of one kind, or a few different ones, perhaps with a line of text."""
    page = Page(rng)
    inks = [name for name in INKS if not alike(name, page.ground)]
    room: Box = (0.0, 0.0, float(page.width), float(page.height))
    text = _line_text(rng, split) if rng.random() < 0.25 else ""
    if text:
        below, edge = rng.random() < 0.7, page.height * rng.uniform(0.22, 0.35)
        room = (0.0, 0.0, room[2], room[3] - edge) if below else (0.0, edge, room[2], room[3])
        y = page.height - edge / 2 if below else edge / 2
        page.write(page.width / 2, y, text, page.fit(text, page.width * 0.9, edge * 0.62), page.ink())
    found = _place_shapes(rng, page, inks, room)
    for shape, color, box in found:
        page.add(shape, f"{color} {shape}", box, "shape")
    page.bring_to(size)
    found = [(shape, color, r.box) for (shape, color, _), r in zip(found, page.regions, strict=True)]
    counts = Counter(f"{color} {shape}" for shape, color, _ in found)
    names = [assets.counted(name, n) for name, n in counts.items()]
    if len(counts) == 1 and len(found) > 1:
        detailed = f"A picture of {names[0]}"
    else:
        parts = [f"{assets.with_article(f'{color} {shape}')} {position(box, size)}" for shape, color, box in found]
        detailed = f"A picture of {enumerate_words(parts)}"
    if page.texts:
        detailed += f" and {page.texts[0].color} text {position(page.texts[0].box, size)}"
    return page.scene(
        scene_id,
        "drawing",
        enumerate_words(names) + (" with text" if page.texts else ""),
        f"{detailed}, on {assets.with_article(page.ground)} background.",
        about_shapes(rng, found, page.ground, page.texts, size),
    )


def _place_shapes(rng: Random, page: Page, inks: list[str], room: Box) -> list[tuple[str, str, Box]]:
    left, top, right, bottom = room
    width, height = right - left, bottom - top
    kind = rng.random()
    if kind < 0.3:
        wanted, spots = [(rng.choice(SHAPES), rng.choice(inks))], [(0.5, 0.5)]
        side = min(width, height) * rng.uniform(0.3, 0.8)
    elif kind < 0.6:  # of one kind, to be counted
        shape = rng.choice(("circle", "circle", "circle", "square", "triangle", "star", "heart", "diamond"))
        spots = _pattern(rng, rng.randint(2, 9))
        wanted = [(shape, rng.choice(inks))] * len(spots)
        side = rng.uniform(0.4, 0.75) * _gap(spots, width, height)
    else:
        n = rng.choice((2, 2, 2, 3, 3, 4))
        spots = _pattern(rng, n)
        wanted = [(rng.choice(SHAPES), rng.choice(inks)) for _ in range(n)]
        side = rng.uniform(0.5, 0.9) * _gap(spots, width, height)
    outline = rng.random() < 0.1
    found = []
    for (shape, color), (x, y) in zip(wanted, spots, strict=True):
        scale = 1.0 if len(set(wanted)) == 1 else rng.uniform(0.65, 1.0)
        layer = mask(rng, shape, max(12, round(side * scale)), outline)
        x0 = round(left + x * width - layer.width / 2)
        y0 = round(top + y * height - layer.height / 2)
        x0 = min(max(x0, 1), page.width - layer.width - 1)
        y0 = min(max(y0, 1), page.height - layer.height - 1)
        box = (x0, y0, x0 + layer.width, y0 + layer.height)
        page.image.paste(page.rgb(color), box, layer)
        found.append((shape, color, (float(box[0]), float(box[1]), float(box[2]), float(box[3]))))
    return sorted(found, key=lambda item: (item[2][0], item[2][1]))


def _pattern(rng: Random, n: int) -> list[tuple[float, float]]:
    """Places of `n` things in a room of 1 x 1: in a row, a column, on a grid, a ring, as on a die, or anywhere."""
    kind = rng.random()
    if n <= 4 and kind < 0.4:
        row = [((i + 0.5) / n, 0.5) for i in range(n)]
        return row if rng.random() < 0.75 else [(y, x) for x, y in row]
    if n > 4 and kind < 0.35:
        columns = math.ceil(n / 2) if rng.random() < 0.5 else 3
        cells = [(i % columns, i // columns) for i in range(n)]
        rows = cells[-1][1] + 1
        return [((x + 0.5) / columns, (y + 0.5) / rows) for x, y in cells]
    if n > 2 and kind < 0.55:
        middle = [(0.5, 0.5)] if n % 2 else []
        ring = n - len(middle)
        start = rng.choice((0.0, math.pi / ring, math.pi / 4))
        turns = [start + 2 * math.pi * i / ring for i in range(ring)]
        return middle + [(0.5 + 0.33 * math.cos(t), 0.5 + 0.33 * math.sin(t)) for t in turns]
    spots: list[tuple[float, float]] = []
    apart = 0.62 / math.sqrt(n)
    while len(spots) < n:
        spot = (rng.uniform(0.14, 0.86), rng.uniform(0.14, 0.86))
        if all(math.dist(spot, other) > apart for other in spots):
            spots.append(spot)
        else:
            apart *= 0.99
    return spots


def _gap(spots: list[tuple[float, float]], width: float, height: float) -> float:
    """How large things at these places may be without touching."""
    placed = [(x * width, y * height) for x, y in spots]
    apart = [max(abs(a[0] - b[0]), abs(a[1] - b[1])) for i, a in enumerate(placed) for b in placed[:i]]
    edges = [2 * min(x, y, width - x, height - y) for x, y in placed]
    return min([*apart, min(edges) * 1.1, 0.8 * min(width, height)])


def _word(rng: Random, split: str) -> str:
    return rng.choice(assets.words(split))


def _line_text(rng: Random, split: str) -> str:
    """A word or two, at times with a number, as on signs."""
    kind = rng.random()
    if kind < 0.5:
        text = _word(rng, split)
    elif kind < 0.75:
        text = f"{_word(rng, split)} {_word(rng, split)}"
    elif kind < 0.9:
        number = rng.choice((str(rng.randint(1, 999)), f"{rng.randint(1, 24)}h", f"{rng.randint(5, 90)}%",
                             f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"))  # fmt: skip
        text = f"{_word(rng, split)} {number}"
    else:
        return rng.choice((str(rng.randint(1, 99999)), f"{rng.randint(1, 99)}.{rng.randint(0, 99):02d}"))
    kind = rng.random()
    return text.upper() if kind < 0.55 else text.title() if kind < 0.75 else text.capitalize() if kind < 0.85 else text


def sign(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """One to three large lines on a plain ground, often in a frame."""
    page = Page(rng)
    n = rng.choice((1, 1, 1, 1, 2, 2, 3))
    lines = [_line_text(rng, split) for _ in range(n)]
    color = page.ink()
    framed = rng.random() < 0.35
    if framed:
        edge = page.side * rng.uniform(0.02, 0.06)
        width = max(2, round(page.side * rng.uniform(0.01, 0.03)))
        frame = (edge, edge, page.width - edge, page.height - edge)
        if rng.random() < 0.7:
            page.pen.rectangle(frame, outline=page.rgb(color), width=width)
        else:
            page.pen.rounded_rectangle(frame, page.side * 0.08, outline=page.rgb(color), width=width)
    high = page.height * (0.84 if framed else 0.94) / n
    share = rng.uniform(0.45, 0.88)
    pixels = min(page.fit(line, page.width * share, high * rng.uniform(0.5, 0.8)) for line in lines)
    middle = page.height * (0.5 if n > 1 or rng.random() < 0.7 else rng.uniform(0.25, 0.75))
    spacing = min(high, pixels * rng.uniform(1.2, 1.8))
    for i, line in enumerate(lines):
        page.write(page.width / 2, middle + (i - (n - 1) / 2) * spacing, line, pixels, color)
    page.bring_to(size)
    whole = " ".join(lines)
    asked = whole if rng.random() < 0.5 else _line_text(rng, split)
    questions = [
        Question("ocr_chart", "reading", "What is written in the picture?", whole),
        Question("vision_centric", "color", "What color is the background?", page.ground),
        Question("vision_centric", "color", "What color is the text?", color),
        Question("ocr_chart", "counting", "How many words are in the picture?", str(len(whole.split()))),
        Question("ocr_chart", "existence", f'Does the sign say "{asked}"?', "yes" if asked == whole else "no"),
        *_is_written(rng, split, whole),
    ]
    if n > 1:
        questions += [
            Question("ocr_chart", "reading", "What does the first line say?", lines[0]),
            Question("ocr_chart", "reading", "What does the last line say?", lines[-1]),
        ]
    words = "a sign with one line" if n == 1 else f"a sign with {assets.NUMBERS[n]} lines"
    return page.scene(
        scene_id,
        "sign",
        f"{words} of text",
        f"A picture of {words} of {color} text{', in a frame,' if framed else ''} "
        f"on {assets.with_article(page.ground)} background.",
        questions,
    )


def _is_written(rng: Random, split: str, text: str) -> list[Question]:
    there = [w for w in text.lower().split() if w.isalpha()]
    if not there:
        return []
    if rng.random() < 0.5:
        word, answer = rng.choice(there), "yes"
    else:
        word, answer = _word(rng, split), "no"
    if answer == "no" and word in there:
        return []
    return [Question("ocr_chart", "existence", f'Is the word "{word}" written in the picture?', answer)]


def price_list(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """Names and prices in two columns: a menu, or a receipt with the total."""
    page = Page(rng, rng.choice(("white", "white", "white", "beige", "light yellow", "light gray", "light blue")))
    n, receipt = rng.randint(2, 4), rng.random() < 0.6
    names = rng.sample(sorted({*GOODS, *(_word(rng, split) for _ in range(30))}), n)
    case = rng.random()
    shown = [name.title() if case < 0.4 else name.upper() if case < 0.5 else name for name in names]
    cents = rng.sample(range(50, 1000, 5) if rng.random() < 0.5 else range(100, 3000, 25), n)
    sign_ = rng.choice(("", "", "", "$"))
    prices = [f"{sign_}{c / 100:.2f}" for c in cents]
    heading = ""
    if rng.random() < 0.7:
        heading = rng.choice((f"{_word(rng, split)} {_word(rng, split)}", _word(rng, split), "menu", "receipt"))
        heading = heading.upper() if rng.random() < 0.6 else heading.title()
    total = rng.choice(("TOTAL", "Total", "total", "TOTAL:")) if receipt else ""
    rows = list(zip(shown, prices, strict=True))
    if receipt:
        rows.append((total, f"{sign_}{sum(cents) / 100:.2f}"))
    slots = len(rows) + (1.2 if heading else 0)
    step = page.height * 0.94 / slots
    margin = page.width * rng.uniform(0.04, 0.1)
    color, pixels = page.ink(), step * rng.uniform(0.45, 0.72)
    widest = max(page.font(100).getlength(f"{a}  {b}") for a, b in rows)
    pixels = min(pixels, 100 * (page.width - 2 * margin) / widest)
    y = page.height * 0.03
    if heading:
        page.write(page.width / 2, y + 0.6 * step, heading, page.fit(heading, page.width * 0.9, pixels * 1.25), color)
        y += 1.2 * step
    for i, (name, price) in enumerate(rows):
        if receipt and i == n:
            line = (margin, y, page.width - margin, y)
            page.pen.line(line, fill=page.rgb(color), width=max(1, page.side // 140))
        page.write(margin, y + step / 2, name, pixels, color, "lm")
        page.write(page.width - margin, y + step / 2, price, pixels, color, "rm")
        y += step
    kind = "receipt" if receipt else "price list"
    page.add(kind, kind, (0.0, 0.0, float(page.width), float(page.height)))
    page.bring_to(size)
    i, order = rng.randrange(n), sorted(range(n), key=lambda k: cents[k])
    questions = [
        Question("ocr_chart", "document_field", f"What is the price of {shown[i]}?", prices[i]),
        Question("ocr_chart", "comparison", "Which item costs the most?", shown[order[-1]]),
        Question("ocr_chart", "comparison", "Which item costs the least?", shown[order[0]]),
        Question("ocr_chart", "counting", f"How many items are listed on the {kind}, without the total?", str(n)),
        Question("ocr_chart", "reading", "What is the first item?", shown[0]),
        Question("ocr_chart", "reading", "What is the last item?", shown[-1]),
        *is_kind(rng, kind),
    ]
    if receipt:
        questions += [Question("ocr_chart", "document_field", "What is the total on the receipt?", rows[-1][1])] * 2
    if heading:
        questions.append(Question("ocr_chart", "reading", f"What is the heading of the {kind}?", heading))
    return page.scene(
        scene_id,
        "price_list",
        f"a {kind}",
        f"A {kind} with {assets.NUMBERS[n]} items and their prices{', and the total' if receipt else ''}.",
        questions,
    )


def plain_chart(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A bar, line or pie chart without numbers, as drawn by hand."""
    page = Page(rng, rng.choice(("white", "white", "white", "light gray", "light yellow")))
    kind = rng.choice(("bar", "bar", "line", "line", "pie"))
    title = ""
    top = page.height * 0.06
    if rng.random() < 0.75:
        title = rng.choice((rng.choice(TOPICS), _word(rng, split).title(), f"{_word(rng, split)} {_word(rng, split)}"))
        pixels = page.fit(title, page.width * 0.9, page.height * rng.uniform(0.07, 0.12))
        page.write(page.width / 2, page.height * 0.09, title, pixels, "black")
        top = page.height * 0.2
    about, questions = {"bar": _bars, "line": _line, "pie": _pie}[kind](rng, page, top)
    page.bring_to(size)
    if title:
        questions.append(Question("ocr_chart", "reading", "What is the title of the chart?", title))
        questions.append(Question("ocr_chart", "reading", "What is the title of the chart?", title))
    questions += [
        Question("general", "recognition", "What kind of chart is this?", f"{kind} chart"),
        *is_kind(rng, f"{kind} chart"),
    ]
    return page.scene(
        scene_id,
        "plain_chart",
        f"a {kind} chart",
        f"A {kind} chart {about}{' and a title at the top' if title else ''}.",
        questions,
    )


def _names(rng: Random, n: int) -> tuple[str, list[str]]:
    """What the things of a chart are called, and their names."""
    kind = rng.randrange(6)
    if kind < 2:
        start = rng.randrange(12)
        return "month", [MONTHS[(start + i) % 12] for i in range(n)]
    if kind == 2:
        start = rng.randint(1990, 2025)
        return "year", [str(start + i) for i in range(n)]
    if kind == 3:
        start = rng.randrange(7)
        return "day", [DAYS[(start + i) % 7] for i in range(n)]
    pools = [[chr(65 + i) for i in range(26)], CITIES, FIRST, [g.title() for g in GOODS]]
    words = [w for w in rng.choice(pools) if len(w) <= 6]
    return "bar", rng.sample(words, n)


def _bars(rng: Random, page: Page, top: float) -> tuple[str, list[Question]]:
    n = rng.randint(3, 6)
    what, names = _names(rng, n)
    values = rng.sample(range(2, 21), n)
    base, left = page.height * rng.uniform(0.82, 0.88), page.width * 0.06
    width = (page.width - 2 * left) / n
    colors = rng.sample(PALETTE, n) if rng.random() < 0.3 else [rng.choice(PALETTE)] * n
    share, pixels = rng.uniform(0.25, 0.45), (page.height - base) * rng.uniform(0.45, 0.6)
    pixels = min(pixels, *(page.fit(name, width * 0.92, pixels) for name in names))
    for i, (name, value, color) in enumerate(zip(names, values, colors, strict=True)):
        x = left + width * (i + 0.5)
        box = (x - share * width, base - (base - top) * value / max(values), x + share * width, base)
        page.pen.rectangle(box, fill=page.rgb(color))
        page.add("bar", f"{color} bar", box)
        page.write(x, base + (page.height - base) / 2, name, pixels, "black")
    page.pen.line((left, base, page.width - left, base), fill=(0, 0, 0), width=max(1, page.side // 120))
    i, j = rng.sample(range(n), 2)
    order = sorted(range(n), key=lambda k: values[k])
    questions = [Question("ocr_chart", "counting", "How many bars does the chart have?", str(n))]
    asked = what if rng.random() < 0.7 else "bar"
    for word, first, second in (("highest", order[-1], order[-2]), ("lowest", order[0], order[1])):
        if abs(values[first] - values[second]) > 1:
            questions.append(
                Question("ocr_chart", "chart_extreme", f"Which {asked} has the {word} value?", names[first])
            )
    if abs(values[i] - values[j]) > 1:
        answer = "yes" if values[i] > values[j] else "no"
        wording = f"Is the value of {names[i]} higher than that of {names[j]}?"
        questions.append(Question("ocr_chart", "chart_compare", wording, answer))
    if len(set(colors)) == 1:
        questions.append(Question("vision_centric", "color", "What color are the bars?", colors[0]))
    else:
        questions.append(Question("vision_centric", "color", f"What color is the bar of {names[i]}?", colors[i]))
    return f"with {assets.NUMBERS[n]} bars", questions


def _line(rng: Random, page: Page, top: float) -> tuple[str, list[Question]]:
    n, color = rng.randint(4, 7), rng.choice(("red", "blue", "green", "orange", "purple", "black"))
    trend = rng.choice(("rising", "falling", "zigzag"))
    values = sorted(rng.uniform(0, 1) for _ in range(n))
    if trend == "falling":
        values.reverse()
    elif trend == "zigzag":
        rng.shuffle(values)
        values[::2], values[1::2] = [v / 2 for v in values[::2]], [0.5 + v / 2 for v in values[1::2]]
    left, right = page.width * rng.uniform(0.06, 0.14), page.width * 0.94
    base = page.height * rng.uniform(0.84, 0.92)
    axes = [(left, top), (left, base), (right, base)]
    page.pen.line(axes, fill=(0, 0, 0), width=max(2, page.side // 110))
    inner = left + (right - left) * 0.06
    points = [(inner + (right - inner) * 0.97 * i / (n - 1), base - (base - top) * (0.06 + 0.86 * v))
              for i, v in enumerate(values)]  # fmt: skip
    ink = page.rgb(color)
    page.pen.line(points, fill=ink, width=max(2, round(page.side * rng.uniform(0.01, 0.025))), joint="curve")
    if rng.random() < 0.6:
        r = page.side * rng.uniform(0.012, 0.025)
        for x, y in points:
            page.pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    page.add("line", f"{trend} {color} line", (min(xs), min(ys) - 2, max(xs), max(ys) + 2))
    questions = [Question("vision_centric", "color", "What is the color of the line?", color)]
    if trend != "zigzag":
        answer = "up" if trend == "rising" else "down"
        questions.append(Question("ocr_chart", "chart_trend", "Does the line go up or down?", answer))
        asked = rng.choice(("rise", "fall"))
        answer = "yes" if asked[0] == trend[0] else "no"
        questions.append(Question("ocr_chart", "chart_trend", f"Does the line {asked} from left to right?", answer))
    return f"with a {trend} {color} line", questions


def _pie(rng: Random, page: Page, top: float) -> tuple[str, list[Question]]:
    n = rng.randint(2, 5)
    cuts = sorted(rng.sample(range(1, 12), n - 1))
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    colors = rng.sample(PALETTE, n)
    height = page.height * 0.95 - top
    r = min(page.width * 0.45, height / 2) * rng.uniform(0.75, 1.0)
    x, y = page.width / 2, top + height / 2
    box = (x - r, y - r, x + r, y + r)
    angle = rng.choice((0.0, -90.0))
    rim = rng.choice(("white", "white", "black", None))
    for share, color in zip(shares, colors, strict=True):
        outline = CSS[rim][0] if rim else None
        page.pen.pieslice(box, angle, angle + 30 * share, fill=page.rgb(color), outline=outline,
                          width=max(1, page.side // 130))  # fmt: skip
        angle += 30 * share
    page.add("pie", f"pie of {assets.NUMBERS[n]} parts", box)
    questions = [Question("ocr_chart", "counting", "How many parts does the pie have?", str(n))]
    order = sorted(range(n), key=lambda k: shares[k])
    if shares[order[-1]] - shares[order[-2]] >= 2:
        questions.append(Question("vision_centric", "color", "What color is the largest part?", colors[order[-1]]))
    if shares[order[1]] - shares[order[0]] >= 2:
        questions.append(Question("vision_centric", "color", "What color is the smallest part?", colors[order[0]]))
    return f"with {assets.NUMBERS[n]} parts in {enumerate_words(colors)}", questions


def dialog(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A window with a title bar, labeled fields and colored buttons."""
    page = Page(rng, rng.choice(("light gray", "light gray", "white", "white", "light blue", "dark blue")))
    w, h = page.width, page.height
    accent = rng.choice(("blue", "dark blue", "black", "green", "gray", "purple", "red"))
    bar = page.rgb(accent)
    title = rng.choice(TITLES) if rng.random() < 0.6 else _word(rng, split).title()
    high = h * rng.uniform(0.12, 0.18)
    page.pen.rectangle((0, 0, w, high), fill=bar)
    page.add("title bar", f"{accent} title bar", (0.0, 0.0, float(w), high))
    centered = rng.random() < 0.2
    page.write(w / 2 if centered else w * 0.04, high / 2, title, page.fit(title, w * 0.8, high * 0.6), _over(bar),
               "mm" if centered else "lm")  # fmt: skip
    fields = rng.sample(FIELDS, rng.choice((1, 1, 1, 2)))
    entries = [_word(rng, split) for _ in fields]
    step = h * 0.54 / len(fields)
    ink, y = page.ink(contrast=110), high + h * 0.03
    pixels = min(step * 0.3, h * 0.09)
    for label, entry in zip(fields, entries, strict=True):
        page.write(w * 0.05, y + step * 0.22, label, pixels, ink, "lm")
        box = (w * 0.05, y + step * 0.42, w * 0.95, y + step * 0.88)
        page.pen.rectangle(box, fill=(255, 255, 255), outline=page.rgb("gray"), width=max(1, page.side // 160))
        page.add("text field", "text field", box)
        page.write(w * 0.075, y + step * 0.65, entry, pixels, "black", "lm")
        y += step
    labels = rng.sample([x for x in LABELS if len(x) <= 6], rng.choice((1, 2, 2, 3)))
    colors = rng.sample([c for c in BUTTONS if not alike(c, page.ground)], len(labels))
    width = w * (0.9 - 0.04 * (len(labels) - 1)) / len(labels)
    top, bottom = h * 0.78, h * 0.95
    for i, (label, color) in enumerate(zip(labels, colors, strict=True)):
        x, fill = w * 0.05 + i * (width + w * 0.04), page.rgb(color)
        page.pen.rounded_rectangle((x, top, x + width, bottom), rng.uniform(0, 0.05) * h, fill=fill)
        page.add("button", f"{color} button", (x, top, x + width, bottom))
        page.write(x + width / 2, (top + bottom) / 2, label, page.fit(label, width * 0.8, h * 0.1), _over(fill))
    page.bring_to(size)
    i, j = rng.randrange(len(labels)), rng.randrange(len(fields))
    questions = [
        Question("ocr_chart", "reading", "What is the title of the window?", title),
        Question("ocr_chart", "reading", f"What does the {colors[i]} button say?", labels[i]),
        Question("ocr_chart", "reading", f"What does the {colors[i]} button say?", labels[i]),
        Question("ocr_chart", "reading", f'What is written in the field "{fields[j]}"?', entries[j]),
        Question("vision_centric", "counting", "How many buttons are in the window?", str(len(labels))),
        Question("vision_centric", "color", f'What color is the button "{labels[i]}"?', colors[i]),
        Question("vision_centric", "color", "What color is the title bar?", accent),
    ]
    return page.scene(
        scene_id,
        "dialog",
        "a screenshot of a window",
        f"A screenshot of a {page.ground} window with {assets.with_article(accent)} title bar, "
        f"{assets.counted('text field', len(fields))} and {assets.counted('button', len(labels))}.",
        questions,
    )


def _over(fill: tuple[int, int, int]) -> str:
    return "white" if draw.luminance(fill) < 150 else "black"
