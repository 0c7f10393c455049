"""A page of any width and height, drawn as with a drawing library and then brought to the square of a scene."""

from __future__ import annotations

from io import BytesIO
from random import Random

from PIL import Image, ImageColor, ImageDraw, ImageFont

from florence_vl_mini.scenes import assets, draw
from florence_vl_mini.scenes.annotations import Box, Question, Region, Scene, Text

# Names of CSS colors by the word that people use for them.
CSS = {
    "red": ("red", "red", "crimson", "firebrick", "tomato"),
    "green": ("green", "green", "forestgreen", "seagreen", "limegreen"),
    "blue": ("blue", "blue", "royalblue", "steelblue", "dodgerblue", "mediumblue"),
    "yellow": ("yellow", "yellow", "gold"),
    "orange": ("orange", "orange", "darkorange"),
    "purple": ("purple", "purple", "indigo", "darkviolet"),
    "pink": ("pink", "hotpink", "lightpink", "deeppink"),
    "brown": ("saddlebrown", "sienna"),
    "black": ("black",),
    "gray": ("gray", "dimgray", "darkgray"),
    "white": ("white",),
    "light blue": ("lightblue", "skyblue"),
    "dark blue": ("navy", "midnightblue", "darkblue"),
    "light gray": ("lightgray", "#f0f0f0", "whitesmoke"),
    "light yellow": ("lightyellow", "#fff8d0"),
    "light green": ("lightgreen", "palegreen"),
    "dark green": ("darkgreen",),
    "beige": ("beige", "cornsilk"),
}
GROUNDS = ("white",) * 10 + (
    "light gray", "light blue", "light yellow", "beige", "yellow", "black", "red", "blue", "green", "orange", "purple",
    "pink", "gray", "dark blue", "dark green", "light green",
)  # fmt: skip
INKS = ("black", "white", "red", "blue", "green", "dark blue", "purple", "brown", "orange", "yellow")
SIDES = (240, 256, 300, 320, 360, 400, 400, 400, 480, 512, 600, 640)

Color = tuple[int, int, int]


class Page:
    """A page that records what is on it; coordinates are its own pixels.

    Args:
        rng: Source of every choice.
        ground: Name of its color; drawn from `GROUNDS` by default.
        square: Whether it must be square; else half of the pages are.
    """

    def __init__(self, rng: Random, ground: str | None = None, square: bool = False) -> None:
        self.rng = rng
        self._colors: dict[str, Color] = {}
        self.ground = ground or rng.choice(GROUNDS)
        self.ground_rgb = self.rgb(self.ground)
        self.width = self.height = rng.choice(SIDES)
        if not square and rng.random() < 0.5:
            self.height = round(self.width * rng.choice((0.5, 0.6, 0.667, 0.75, 0.75, 1.2, 1.333)))
        self.image = Image.new("RGB", (self.width, self.height), self.ground_rgb)
        self.pen = ImageDraw.Draw(self.image)
        self.regions: list[Region] = []
        self.texts: list[Text] = []
        kind = rng.random()
        self._font: str | None = None  # Pillow's own, which whoever draws with Pillow meets first
        if kind < 0.65:
            sans = [p for p in assets.font_files() if "Sans" in p.name and ("Mono" not in p.name or kind < 0.1)]
            self._font = str(rng.choice(sans if kind < 0.5 else assets.font_files()))

    def rgb(self, name: str) -> Color:
        """One of the CSS colors that people call so, the same all over the page."""
        if name not in self._colors:
            self._colors[name] = ImageColor.getrgb(self.rng.choice(CSS[name]))[:3]
        return self._colors[name]

    @property
    def side(self) -> int:
        """The shorter side."""
        return min(self.width, self.height)

    def font(self, pixels: float) -> ImageFont.FreeTypeFont:
        """The page's font."""
        size = max(7, round(pixels))
        return ImageFont.load_default(size) if self._font is None else ImageFont.truetype(self._font, size)  # type: ignore[return-value]

    def fit(self, text: str, width: float, pixels: float) -> float:
        """The font size, at most `pixels`, at which a text is at most `width` wide."""
        return min(pixels, 100 * width / max(1.0, self.font(100).getlength(text)))

    def ink(self, ground: Color | None = None, contrast: float = 90) -> str:
        """Name of a text color that stands out from a ground, mostly black or white."""
        light = draw.luminance(ground or self.ground_rgb)
        fits = [name for name in INKS if abs(draw.luminance(draw.COLORS[name]) - light) > contrast]
        plain = "black" if light > 127 else "white"
        return self.rng.choice(fits) if fits and self.rng.random() < 0.3 else plain

    def write(self, x: float, y: float, text: str, pixels: float, color: str, anchor: str = "mm") -> Text:
        """One line; anchor as in Pillow ("lm": left middle, "mm", "rm")."""
        font = self.font(pixels)
        self.pen.text((x, y), text, font=font, fill=self.rgb(color), anchor=anchor)
        left, top, right, bottom = self._inside(self.pen.textbbox((x, y), text, font=font, anchor=anchor))
        self.texts.append(Text(text, (left, top, right, top, right, bottom, left, bottom), color))
        return self.texts[-1]

    def add(self, name: str, description: str, box: tuple[float, ...], category: str | None = None) -> None:
        """Record an object."""
        self.regions.append(Region(name, description, self._inside(box), category))

    def _inside(self, box: tuple[float, ...]) -> Box:
        left, top, right, bottom = box
        return max(left, 0.0), max(top, 0.0), min(right, float(self.width)), min(bottom, float(self.height))

    def bring_to(self, size: int) -> None:
        """Make picture and annotations `size` x `size`, as a processor does with a picture of any shape."""
        sx, sy = size / self.width, size / self.height
        resampling = self.rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
        self.image = self.image.resize((size, size), resampling)
        if self.rng.random() < 0.25:  # as saved and opened again
            file = BytesIO()
            self.image.save(file, "JPEG", quality=self.rng.randint(70, 95))
            self.image = Image.open(file).convert("RGB")
        self.regions = [
            Region(r.name, r.description, _scaled(r.box, sx, sy), r.category)  # type: ignore[arg-type]
            for r in self.regions
        ]
        self.texts = [Text(t.text, _scaled(t.quad, sx, sy), t.color) for t in self.texts]

    def scene(self, scene_id: str, kind: str, caption: str, detailed: str, questions: list[Question]) -> Scene:
        """The scene; after `bring_to`."""
        return Scene(scene_id, kind, self.image, caption, detailed, self.regions, self.texts, questions)


def _scaled(values: tuple[float, ...], sx: float, sy: float) -> tuple[float, ...]:
    return tuple(v * (sy if i % 2 else sx) for i, v in enumerate(values))
