"""Twenty pictures that a new user might draw or take, with the expected answers: `florence-vl mini try`.

They are drawn with Pillow and its built-in font, and on purpose not with `florence_vl_mini.scenes`, which draws the
training pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

import florence_vl_mini
from florence_vl.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from florence_vl.serve.session import ChatSession

SHORT = "\nAnswer the question using a single word or phrase."  # as in LLaVA-1.5's instruction data
Drawing = Callable[[], Image.Image]


@dataclass(frozen=True)
class Trial:
    """A picture and a question about it.

    Attributes:
        name: Short name of the picture.
        draw: Draws it.
        question: What is asked.
        answers: All answers that count as correct.
    """

    name: str
    draw: Drawing
    question: str
    answers: tuple[str, ...]

    def right(self, answer: str) -> bool:
        """Whether an answer is correct, as the mini suite's metric parses it."""
        judge = METRICS["short_answer"].judge
        return any(judge(answer, {"answer": known, "choices": []}).score == 1 for known in self.answers)


@dataclass(frozen=True)
class Outcome:
    """The model's answer to a trial.

    Attributes:
        trial: The picture with its question.
        answer: The model's answer.
        right: Whether the answer is correct.
    """

    trial: Trial
    answer: str
    right: bool


def run(session: ChatSession, trials: tuple[Trial, ...] | None = None) -> list[Outcome]:
    """Ask about each picture in a separate conversation."""
    outcomes = []
    for trial in TRIALS if trials is None else trials:
        session.reset()
        session.show(trial.draw())
        answer = session.ask(trial.question + SHORT).strip()
        outcomes.append(Outcome(trial, answer, trial.right(answer)))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """The answers as a Markdown table, and the score."""
    lines = ["| picture | question | expected | answer | |", "|---|---|---|---|---|"]
    for o in outcomes:
        answer = " ".join(o.answer.split()).replace("|", "\\|")
        answer = answer if len(answer) <= 48 else answer[:47] + "…"
        lines.append(
            f"| {o.trial.name} | {o.trial.question} | {o.trial.answers[0]} | {answer} | {'right' if o.right else ''} |"
        )
    right = sum(o.right for o in outcomes)
    return "\n".join([*lines, "", f"{right} of {len(outcomes)} right"])


_STAR = ((380, 70), (400, 130), (460, 130), (412, 165), (430, 225), (380, 190), (330, 225), (348, 165), (300, 130),
         (360, 130))  # fmt: skip


def _page(color: str = "white", size: tuple[int, int] = (400, 400)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", size, color)
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _red_circle() -> Image.Image:
    image, ink = _page()
    ink.ellipse((100, 100, 300, 300), fill="red")
    return image


def _blue_square() -> Image.Image:
    image, ink = _page()
    ink.rectangle((110, 110, 290, 290), fill="blue")
    return image


def _five_dots() -> Image.Image:
    image, ink = _page()
    for x, y in ((90, 90), (310, 90), (200, 200), (90, 310), (310, 310)):
        ink.ellipse((x - 32, y - 32, x + 32, y + 32), fill="black")
    return image


def _triangle_and_star() -> Image.Image:
    image, ink = _page(size=(500, 300))
    ink.polygon(((120, 80), (200, 220), (40, 220)), fill="green")
    ink.polygon(_STAR, fill="gold")
    return image


def _star() -> Image.Image:
    image, ink = _page("purple")
    ink.polygon([(2 * x - 560, 2 * y - 95) for x, y in _STAR], fill="yellow")
    return image


def _no_parking() -> Image.Image:
    image, ink = _page("yellow", (440, 240))
    ink.rectangle((12, 12, 428, 228), outline="black", width=6)
    ink.text((220, 120), "NO PARKING", fill="black", font=_font(64), anchor="mm")
    return image


def _sign_with_shapes() -> Image.Image:
    image, ink = _page()
    ink.rectangle((60, 60, 170, 170), fill="red")
    ink.ellipse((230, 60, 340, 170), fill="blue")
    ink.text((200, 290), "OPEN 24H", fill="black", font=_font(64), anchor="mm")
    return image


def _hello() -> Image.Image:
    image, ink = _page(size=(400, 200))
    ink.text((200, 100), "HELLO", fill="black", font=_font(90), anchor="mm")
    return image


def _stop() -> Image.Image:
    image, ink = _page("red")
    ink.text((200, 200), "STOP", fill="white", font=_font(110), anchor="mm")
    return image


def _orange_arrow() -> Image.Image:
    image, ink = _page("navy", (480, 320))
    ink.polygon(((60, 130), (280, 130), (280, 70), (420, 160), (280, 250), (280, 190), (60, 190)), fill="orange")
    return image


def _receipt() -> Image.Image:
    image, ink = _page(size=(360, 420))
    ink.text((180, 40), "COFFEE HOUSE", fill="black", font=_font(36), anchor="mm")
    for row, (name, price) in enumerate((("espresso", "2.50"), ("muffin", "3.00"), ("juice", "2.25"))):
        ink.text((30, 100 + 60 * row), name, fill="black", font=_font(30))
        ink.text((330, 100 + 60 * row), price, fill="black", font=_font(30), anchor="ra")
    ink.line((30, 290, 330, 290), fill="black", width=3)
    ink.text((30, 310), "TOTAL", fill="black", font=_font(34))
    ink.text((330, 310), "7.75", fill="black", font=_font(34), anchor="ra")
    return image


def _bar_chart() -> Image.Image:
    image, ink = _page(size=(480, 400))
    ink.text((240, 30), "Sales", fill="black", font=_font(32), anchor="mm")
    for i, (name, value) in enumerate((("Jan", 40), ("Feb", 75), ("Mar", 130), ("Apr", 60))):
        x = 60 + 105 * i
        ink.rectangle((x, 340 - 2 * value, x + 60, 340), fill="steelblue")
        ink.text((x + 30, 365), name, fill="black", font=_font(28), anchor="mm")
    ink.line((40, 340, 460, 340), fill="black", width=3)
    return image


def _pie_chart() -> Image.Image:
    image, ink = _page()
    start = 0
    for share, color in ((150, "tomato"), (120, "gold"), (90, "seagreen")):
        ink.pieslice((60, 60, 340, 340), start, start + share, fill=color, outline="white", width=3)
        start += share
    return image


def _line_chart() -> Image.Image:
    image, ink = _page(size=(480, 360))
    ink.text((240, 30), "Visitors", fill="black", font=_font(32), anchor="mm")
    ink.line((50, 60, 50, 310, 450, 310), fill="black", width=3)
    points = [(70, 280), (150, 220), (230, 240), (310, 150), (390, 100), (440, 80)]
    ink.line(points, fill="crimson", width=5)
    for x, y in points:
        ink.ellipse((x - 6, y - 6, x + 6, y + 6), fill="crimson")
    return image


def _window() -> Image.Image:
    image, ink = _page("#f0f0f0", (480, 320))
    ink.rectangle((0, 0, 480, 48), fill="#305080")
    ink.text((16, 24), "Settings", fill="white", font=_font(28), anchor="lm")
    ink.text((24, 90), "User name", fill="black", font=_font(24))
    ink.rectangle((24, 126, 456, 170), fill="white", outline="gray", width=2)
    ink.text((34, 148), "maria", fill="black", font=_font(24), anchor="lm")
    for x, color, label in ((24, "gray", "Cancel"), (256, "blue", "Save")):
        ink.rounded_rectangle((x, 240, x + 200, 296), 10, fill=color)
        ink.text((x + 100, 268), label, fill="white", font=_font(28), anchor="mm")
    return image


def _price_list() -> Image.Image:
    image, ink = _page("beige", (400, 300))
    for row, (name, price) in enumerate((("tea", "2.50"), ("cake", "4.00"), ("soup", "5.75"))):
        ink.text((30, 40 + 80 * row), name, fill="black", font=_font(44))
        ink.text((370, 40 + 80 * row), price, fill="black", font=_font(44), anchor="ra")
    return image


def _photo(name: str) -> Drawing:
    def open_photo() -> Image.Image:
        row = next(row for row in florence_vl_mini.photos() if row["id"] == name)
        return Image.open(row["file"]).convert("RGB")

    return open_photo


TRIALS = (
    Trial("red circle", _red_circle, "What color is the circle?", ("red",)),
    Trial("blue square", _blue_square, "What shape is shown in the picture?", ("square", "blue square")),
    Trial("five dots", _five_dots, "How many circles are in the picture?", ("5",)),
    Trial("triangle, star", _triangle_and_star, "Is the triangle to the left of the star?", ("yes",)),
    Trial("star", _star, "What color is the star?", ("yellow",)),
    Trial("shapes and sign", _sign_with_shapes, "What is written in the picture?", ("OPEN 24H", "OPEN 24 H")),
    Trial("HELLO", _hello, "What is written in the picture?", ("HELLO",)),
    Trial("stop sign", _stop, "What color is the background?", ("red",)),
    Trial("arrow", _orange_arrow, "What color is the arrow?", ("orange",)),
    Trial("sign", _no_parking, "What is written in the picture?", ("NO PARKING",)),
    Trial("receipt", _receipt, "What is the total on the receipt?", ("7.75",)),
    Trial("bar chart", _bar_chart, "Which month has the highest value?", ("Mar", "March")),
    Trial("pie chart", _pie_chart, "Is this a pie chart?", ("yes",)),
    Trial("line chart", _line_chart, "What is the title of the chart?", ("Visitors",)),
    Trial("window", _window, "What does the blue button say?", ("Save",)),
    Trial("price list", _price_list, "What is the price of tea?", ("2.50", "2.5")),
    Trial("photograph: cat", _photo("chelsea"), "What animal is in the picture?", ("cat", "cat face")),
    Trial("photograph: coffee", _photo("coffee"), "Is there a cup in the picture?", ("yes",)),
    Trial("photograph: astronaut", _photo("astronaut"), "Is there a person in the picture?", ("yes",)),
    Trial("photograph: rocket", _photo("rocket"), "What is in the picture?", ("rocket", "rocket launch")),
)
