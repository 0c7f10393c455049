"""Screenshots of simple programs, and pages of small print: interface elements and dense text."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from florence_vl_mini.scenes import assets, draw
from florence_vl_mini.scenes.annotations import Question, Region, Scene, Text
from florence_vl_mini.scenes.documents import Sheet

LABELS = ("OK", "Cancel", "Save", "Open", "Delete", "Send", "Next", "Back", "Close", "Print", "Search", "Log in",
          "Edit", "Share", "Copy", "Help", "Start", "Stop", "Buy now", "Sign up")  # fmt: skip
TITLES = (
    "Settings",
    "Files",
    "Mail",
    "Photos",
    "Music",
    "Calendar",
    "Notes",
    "Weather",
    "Account",
    "Downloads",
    "Editor",
)
OPTIONS = ("Sound", "Wi-Fi", "Dark mode", "Updates", "Location", "Backup", "Bluetooth", "Spelling", "Grid", "Password")
THEMES = (("white", "black", "blue"), ("light gray", "black", "dark blue"), ("white", "black", "green"),
          ("black", "white", "purple"), ("dark blue", "white", "orange"))  # fmt: skip


def interface(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """A window with a title bar, options with check boxes, a text field, and buttons."""
    ground, ink, accent = rng.choice(THEMES)
    sheet = Sheet(Image.new("RGB", (size, size), draw.COLORS[ground]), ink)
    u, pen = size / 256, ImageDraw.Draw(sheet.image)
    title = rng.choice(TITLES)
    pen.rectangle((0, 0, size, 34 * u), fill=draw.COLORS[accent])
    sheet.write(12 * u, 9 * u, title, round(rng.uniform(17, 21) * u), bold=True, color=_on(accent))
    regions = [Region("title bar", f"{accent} title bar", (0.0, 0.0, float(size), 34 * u))]
    options = rng.sample(OPTIONS, rng.randint(1, 3))
    checked = {name: rng.random() < 0.5 for name in options}
    height = round(rng.uniform(14, 19) * u)
    y = 50 * u
    for name in options:
        box = (14 * u, y, 32 * u, y + 18 * u)
        pen.rectangle(box, outline=draw.COLORS[ink], width=max(1, round(1.6 * u)))
        if checked[name]:
            pen.line(
                [(17 * u, y + 9 * u), (22 * u, y + 14 * u), (30 * u, y + 3 * u)], draw.COLORS[accent], round(3 * u)
            )
        regions.append(Region("check box", f"{'checked' if checked[name] else 'empty'} check box", box))
        sheet.write(42 * u, y + 2 * u, name, height)
        y += 30 * u
    word = rng.choice(assets.words(split))
    field = (14 * u, y + 4 * u, size - 14 * u, y + 32 * u)
    pen.rectangle(field, fill=(255, 255, 255), outline=draw.COLORS["gray"], width=max(1, round(u)))
    regions.append(Region("text field", "text field", field))
    sheet.write(22 * u, y + 10 * u, word, height, color="black")
    labels = rng.sample(LABELS, rng.randint(1, 2))
    colors = rng.sample(("blue", "green", "red", "gray", "orange"), len(labels))
    width = (size - 14 * u * (len(labels) + 1)) / len(labels)
    top = size - 50 * u
    for i, (label, color) in enumerate(zip(labels, colors, strict=True)):
        x = 14 * u + i * (width + 14 * u)
        box = (x, top, x + width, size - 14 * u)
        pen.rounded_rectangle(box, 6 * u, fill=draw.COLORS[color])
        regions.append(Region("button", f"{color} button", box))
        sheet.write(x + width / 2, top + 10 * u, label, round(rng.uniform(15, 19) * u), bold=True, anchor="m",
                    color=_on(color))  # fmt: skip
    i, option = rng.randrange(len(labels)), rng.choice(options)
    questions = [
        Question("ocr_chart", "reading", "What is the title of the window?", title),
        Question("ocr_chart", "reading", f"What does the {colors[i]} button say?", labels[i]),
        Question("ocr_chart", "reading", "What is written in the text field?", word),
        Question("vision_centric", "counting", "How many check boxes are in the window?", str(len(options))),
        Question("vision_centric", "color", f'What color is the button "{labels[i]}"?', colors[i]),
        Question("general", "existence", f'Is the option "{option}" checked?', "yes" if checked[option] else "no"),
    ]
    return Scene(
        scene_id,
        "interface",
        sheet.image,
        caption="a screenshot of a window",
        detailed_caption=f"A screenshot of a {ground} window with {assets.with_article(accent)} title bar, "
        f"{assets.counted('check box', len(options))}, a text field and {assets.counted('button', len(labels))}.",
        regions=regions,
        texts=sheet.texts,
        questions=questions,
    )


def _on(color: str) -> str:
    return "white" if draw.luminance(draw.COLORS[color]) < 150 else "black"


def small_text(rng: Random, split: str, size: int, scene_id: str) -> Scene:
    """Two to five lines of small print in one font, 11 to 24 px high on 256 px."""
    ground, ink = rng.choice((("white", "black"), ("white", "black"), ("light yellow", "black"), ("black", "white"),
                              ("light blue", "dark blue"), ("white", "blue"), ("light gray", "brown")))  # fmt: skip
    canvas = Image.new("RGB", (size, size), draw.jitter(rng, draw.COLORS[ground], 8))
    pixels = rng.uniform(11, 24) * size / 256
    font = assets.font(rng.choice(assets.font_files()), max(8, round(pixels)))
    room, left = 80, rng.uniform(6, 24) * size / 256
    wanted = rng.randint(2, 5)
    spacing = pixels * rng.uniform(1.2, 1.9)
    y = rng.uniform(0.04, 0.9) * (size - wanted * spacing)
    texts: list[Text] = []
    for _ in range(wanted):
        line = rng.choice(assets.words(split)).capitalize()
        while rng.random() < 0.75:
            longer = f"{line} {_token(rng, split)}"
            if font.getlength(longer) > size - 2 * left:
                break
            line = longer
        room -= len(line) + 1
        if room < 0:
            break
        x0, y0, x1, y1 = font.getbbox(line)
        ImageDraw.Draw(canvas).text((left - x0, y - y0), line, font=font, fill=draw.COLORS[ink])
        right, bottom = min(left + x1 - x0, float(size)), min(y + y1 - y0, float(size))
        texts.append(Text(line, (left, y, right, y, right, bottom, left, bottom), ink))
        y += spacing
    count = assets.counted("line", len(texts))
    questions = [
        Question("ocr_chart", "reading", "What does the first line say?", texts[0].text),
        Question("ocr_chart", "counting", "How many lines of text are in the picture?", str(len(texts))),
        Question("vision_centric", "color", "What color is the background?", ground),
    ]
    if len(texts) > 1:
        questions.append(Question("ocr_chart", "reading", "What does the last line say?", texts[-1].text))
    return Scene(
        scene_id,
        "small_text",
        canvas,
        caption=f"{count} of text",
        detailed_caption=f"A picture of {count} of small {ink} text on a {ground} background.",
        texts=texts,
        questions=questions,
    )


def _token(rng: Random, split: str) -> str:
    kind = rng.random()
    if kind < 0.8:
        return rng.choice(assets.words(split))
    return str(rng.randint(0, 999)) if kind < 0.9 else f"{rng.randint(1, 60)}.{rng.randint(0, 99):02d}"
