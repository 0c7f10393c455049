"""Small documents: receipts, forms, labels, tables; every line's text and quad known."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from PIL import Image, ImageDraw

from florence_vl_mini.scenes import assets, draw, tables
from florence_vl_mini.scenes.annotations import Question, Region, Scene, Text

FIRST, LAST, CITIES, SHOPS, GOODS, FORMS, MONTHS = map(
    assets.vocabulary, ("first_names", "last_names", "cities", "shops", "goods", "forms", "months")
)


@dataclass
class Sheet:
    """A page that records what is written on it."""

    image: Image.Image
    color: str = "black"
    texts: list[Text] = field(default_factory=list)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        *,
        bold: bool = False,
        anchor: str = "l",
        color: str | None = None,
        halo: int = 0,
    ) -> float:
        """One line with its left ("l"), right ("r") or middle ("m") at x and its top at y; returns its height.

        `halo` is the width in pixels of a white rim that keeps text apart from lines under it.
        """
        font = assets.sans(size, bold)
        left, top, right, bottom = font.getbbox(text)
        x = x - (right - left) if anchor == "r" else x - (right - left) / 2 if anchor == "m" else x
        name = color or self.color
        ImageDraw.Draw(self.image).text(
            (x - left, y - top), text, font=font, fill=draw.COLORS[name], stroke_width=halo, stroke_fill=(255, 255, 255)
        )
        w, h = right - left, bottom - top
        x, y = max(x, 0.0), max(y, 0.0)
        r, b = min(x + w, float(self.image.width)), min(y + h, float(self.image.height))
        self.texts.append(Text(text, (x, y, r, y, r, b, x, b), name))
        return float(h)


def _sheet(rng: Random, size: int) -> Sheet:
    paper = rng.choice(("white", "white", "light yellow", "beige", "light gray", "light blue"))
    image = Image.new("RGB", (size, size), draw.jitter(rng, draw.COLORS[paper], 6))
    return Sheet(image, rng.choice(("black", "black", "dark blue", "brown")))


def receipt(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A shop's receipt with prices and their total."""
    sheet = _sheet(rng, size)
    u = size / 256
    n = rng.randint(2, 4)
    goods = rng.sample(GOODS, n)
    cents = [rng.randint(1, 19) * 100 + rng.choice((0, 25, 50, 75, 99)) for _ in goods]
    shop = rng.choice(SHOPS)
    sheet.write(size / 2, 12 * u, shop, round(26 * u), bold=True, anchor="m")
    y = 56 * u
    for name, price in zip(goods, cents, strict=True):
        sheet.write(14 * u, y, name, round(22 * u))
        sheet.write(size - 14 * u, y, f"{price / 100:.2f}", round(22 * u), anchor="r")
        y += 34 * u
    ImageDraw.Draw(sheet.image).line(
        (14 * u, y, size - 14 * u, y), fill=draw.COLORS[sheet.color], width=max(1, round(2 * u))
    )
    y += 10 * u
    total = f"{sum(cents) / 100:.2f}"
    sheet.write(14 * u, y, "TOTAL", round(24 * u), bold=True)
    sheet.write(size - 14 * u, y, total, round(24 * u), bold=True, anchor="r")
    by_price = sorted(range(n), key=lambda i: cents[i])
    item = rng.randrange(n)
    questions = [
        Question("ocr_chart", "document_field", "What is the total on the receipt?", total),
        Question("ocr_chart", "document_field", f"What is the price of {goods[item]}?", f"{cents[item] / 100:.2f}"),
        Question("ocr_chart", "reading", "What is the name of the shop?", shop),
        Question("ocr_chart", "counting", "How many items are listed on the receipt, without the total?", str(n)),
    ]
    if cents[by_price[-1]] != cents[by_price[-2]]:
        questions.append(Question("ocr_chart", "comparison", "Which item costs the most?", goods[by_price[-1]]))
    name = shop.title()
    return Scene(
        scene_id,
        "receipt",
        sheet.image,
        caption="a receipt",
        detailed_caption=f"A receipt of a shop with {assets.NUMBERS[n]} items, their prices and the total.",
        regions=[Region("receipt", "receipt", (0.0, 0.0, float(size), float(size)))],
        texts=sheet.texts,
        questions=[*questions, *is_kind(rng, "receipt")],
    )


def form(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A card or ticket with named fields."""
    sheet = _sheet(rng, size)
    u = size / 256
    title = rng.choice(FORMS)
    pool = {
        "Name": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        "City": rng.choice(CITIES),
        "Date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1990, 2030)}",
        "Number": str(rng.randint(1000, 99999)),
        "Seat": f"{rng.randint(1, 40)}{rng.choice('ABCDEF')}",
        "Age": str(rng.randint(18, 90)),
        "Room": str(rng.randint(100, 599)),
        "Color": rng.choice(("red", "blue", "green", "silver", "white")),
    }
    keys = rng.sample(list(pool), rng.randint(3, 4))
    ink = ImageDraw.Draw(sheet.image)
    banner = rng.choice(("dark blue", "dark green", "purple", "red", "black"))
    ink.rectangle((0, 0, size, 44 * u), fill=draw.COLORS[banner])
    sheet.write(size / 2, 12 * u, title, round(25 * u), bold=True, anchor="m", color="white")
    y = 66 * u
    for key in keys:
        sheet.write(14 * u, y, f"{key}:", round(20 * u), bold=True)
        sheet.write(106 * u, y, pool[key], round(20 * u))
        y += 44 * u
    questions = [
        Question("ocr_chart", "document_field", f"What is the {key.lower()} on the {title.lower()}?", pool[key])
        for key in rng.sample(keys, 2)
    ]
    missing = rng.choice([k for k in pool if k not in keys])
    asked, answer = (rng.choice(keys), "yes") if rng.random() < 0.5 else (missing, "no")
    questions.append(Question("ocr_chart", "existence", f'Is there a field called "{asked}" on the card?', answer))
    return Scene(
        scene_id,
        "form",
        sheet.image,
        caption=f"a {title.lower()}" if title[0] not in "AEIOU" else f"an {title.lower()}",
        detailed_caption=f"{'An' if title[0] in 'AEIOU' else 'A'} {title.lower()} with the fields "
        f"{', '.join(k.lower() for k in keys[:-1])} and {keys[-1].lower()}, and a {banner} banner at the top.",
        regions=[
            Region("banner", f"{banner} banner", (0.0, 0.0, float(size), 44.0 * u)),
        ],
        texts=sheet.texts,
        questions=[*questions, *is_kind(rng, title.lower())],
    )


def is_kind(rng: Random, kind: str) -> list[Question]:
    others = ["receipt", *(f.lower() for f in FORMS), "bar chart", "pie chart", "table"]
    if rng.random() < 0.5:
        return [
            Question(
                "general", "existence", f"Is this a {kind}?" if kind[0] not in "aeiou" else f"Is this an {kind}?", "yes"
            )
        ]
    other = rng.choice([o for o in others if o != kind])
    return [Question("general", "existence", f"Is this {'an' if other[0] in 'aeiou' else 'a'} {other}?", "no")]


def table(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A table of three to four rows and two number columns."""
    sheet = _sheet(rng, size)
    u = size / 256
    corner, n = "", rng.randint(3, 4)
    if rng.random() < tables.SHARE:
        corner, rows, columns, values = tables.pick_table(rng, split, n)
    else:
        rows = rng.sample(rng.choice((FIRST, CITIES, [g.title() for g in GOODS])), n)
        columns = rng.sample(("2021", "2022", "2023", "Mon", "Tue", "Fri", "North", "South", "Sold", "Left"), 2)
        values = [[str(rng.randint(1, 99)) for _ in columns] for _ in rows]
    header = rng.choice(("dark blue", "dark green", "gray", "purple"))
    ink = ImageDraw.Draw(sheet.image)
    height = size / (len(rows) + 1)
    ink.rectangle((0, 0, size, height), fill=draw.COLORS[header])
    xs = (150 * u, 236 * u)
    name_size = tables.fit(rows, 92 * u, 21 * u, 15 * u)
    head_size = tables.fit(columns, 78 * u, 22 * u, 16 * u, True)
    if corner:
        corner_size = tables.fit([corner], 60 * u, 18 * u, 13 * u, True)
        sheet.write(10 * u, height / 2 - 7 * u, corner, corner_size, bold=True, color="white")
    for x, name in zip(xs, columns, strict=True):
        sheet.write(x, height / 2 - 9 * u, name, head_size, bold=True, anchor="r", color="white")
    for i, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = height * (i + 1)
        ink.line((0, y, size, y), fill=draw.COLORS["gray"], width=1)
        sheet.write(10 * u, y + height / 2 - 9 * u, name, name_size)
        for x, value in zip(xs, line, strict=True):
            sheet.write(x, y + height / 2 - 9 * u, value, round(22 * u), anchor="r")
    r, c = rng.randrange(len(rows)), rng.randrange(2)
    column = [float(line[c]) for line in values]
    questions = [
        Question(
            "ocr_chart",
            "table_value",
            f'What is the value of {rows[r]} in the column "{columns[c]}"?',
            values[r][c],
        ),
        Question("ocr_chart", "counting", "How many rows does the table have, without the header?", str(len(rows))),
    ]
    if column.count(max(column)) == 1:
        best = rows[column.index(max(column))]
        questions.append(
            Question("ocr_chart", "comparison", f'Which row has the highest value in the column "{columns[c]}"?', best)
        )
    return Scene(
        scene_id,
        "table",
        sheet.image,
        caption="a table of numbers",
        detailed_caption=f"A table of numbers with {assets.NUMBERS[len(rows)]} rows, two columns "
        f"and a {header} header.",
        regions=[Region("table header", f"{header} table header", (0.0, 0.0, float(size), float(height)))],
        texts=sheet.texts,
        questions=[*questions, *is_kind(rng, "table")],
    )
