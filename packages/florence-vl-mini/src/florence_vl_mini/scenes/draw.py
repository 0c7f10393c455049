"""Backgrounds, sprites and text onto a canvas, with the exact boxes of what was drawn."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from florence_vl_mini.scenes import assets
from florence_vl_mini.scenes.annotations import Box

COLORS = {
    "black": (20, 20, 20), "white": (250, 250, 250), "red": (208, 32, 38), "green": (28, 130, 52),
    "blue": (32, 72, 200), "yellow": (246, 208, 24), "orange": (238, 126, 24), "purple": (118, 46, 156),
    "brown": (120, 72, 34), "gray": (128, 128, 128), "pink": (240, 130, 170), "light blue": (174, 214, 244),
    "light green": (190, 230, 180), "light yellow": (252, 244, 190), "dark blue": (16, 28, 88),
    "dark green": (10, 66, 32), "light gray": (222, 222, 222), "beige": (236, 222, 196),
}  # fmt: skip
BACKGROUNDS = ("white", "light blue", "light green", "light yellow", "light gray", "beige", "pink", "dark blue",
               "dark green", "gray", "black", "yellow", "orange", "purple")  # fmt: skip
TEXT_COLORS = ("black", "white", "red", "green", "blue", "yellow", "orange", "purple", "brown", "dark blue", "pink")


def luminance(rgb: tuple[float, ...]) -> float:
    """Perceived brightness, 0 to 255 (Rec. 601)."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def jitter(rng: Random, rgb: tuple[int, int, int], by: int = 10) -> tuple[int, int, int]:
    """A color a little off."""
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in rgb)  # type: ignore[return-value]


def background(rng: Random, size: int, busy: float = 0.4) -> tuple[Image.Image, str | None]:
    """A square background and its color's name, None where it has no single color.

    Args:
        busy: Chance of a pattern or a photographed texture instead of one color.
    """
    name = rng.choice(BACKGROUNDS)
    color = jitter(rng, COLORS[name])
    if rng.random() >= busy:
        image = Image.new("RGB", (size, size), color)
        if rng.random() < 0.4:  # a gentle gradient of the same color
            ramp = Image.linear_gradient("L").resize((size, size)).rotate(rng.choice((0, 90, 180, 270)))
            other = Image.new("RGB", (size, size), jitter(rng, color, 28))
            image = Image.composite(image, other, ramp)
        return image, name
    kind = rng.choice(("blobs", "stripes", "checker", "gradient", "photo"))
    second = jitter(rng, color, 60)
    if kind == "photo":
        texture = rng.choice(assets.photo_textures())
        side = rng.randint(min(texture.size) // 3, min(texture.size))
        x, y = rng.randint(0, texture.width - side), rng.randint(0, texture.height - side)
        image = texture.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
        return Image.blend(image, Image.new("RGB", (size, size), color), rng.uniform(0.3, 0.7)), None
    if kind == "blobs":
        noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (6, 6), dtype=np.uint8)
        mask = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    elif kind == "gradient":
        mask = Image.linear_gradient("L").resize((size, size)).rotate(rng.choice((0, 90, 180, 270)))
        second = jitter(rng, COLORS[rng.choice(BACKGROUNDS)])
    else:
        n, period = size, rng.randint(10, 48)
        yy, xx = np.mgrid[0:n, 0:n]
        if kind == "stripes":
            angle = rng.uniform(0, math.pi)
            wave = (xx * math.cos(angle) + yy * math.sin(angle)) // period % 2
        else:
            wave = (xx // period + yy // period) % 2
        mask = Image.fromarray((wave * 255).astype(np.uint8))
    return Image.composite(Image.new("RGB", (size, size), second), Image.new("RGB", (size, size), color), mask), None


def overlaps(box: Box, others: list[Box], gap: float) -> bool:
    """Whether a box comes nearer than `gap` pixels to any other."""
    return any(
        box[0] < o[2] + gap and box[2] > o[0] - gap and box[1] < o[3] + gap and box[3] > o[1] - gap for o in others
    )


def place(
    rng: Random, size: int, w: int, h: int, taken: list[Box], gap: float, tries: int = 40
) -> tuple[int, int] | None:
    """A free top-left corner for a w x h box inside the picture, or None."""
    margin = max(1, size // 128)
    if w > size - 2 * margin or h > size - 2 * margin:
        return None
    for _ in range(tries):
        x, y = rng.randint(margin, size - w - margin), rng.randint(margin, size - h - margin)
        if not overlaps((x, y, x + w, y + h), taken, gap):
            return x, y
    return None


def sprite_at(rng: Random, sprite_id: str, side: int, *, rotate: float = 0.3) -> Image.Image:
    """A sprite scaled so that its longer side is `side`, perhaps mirrored and turned a little, trimmed."""
    image = assets.picture(sprite_id)
    scale = side / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < rotate:
        image = image.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR, expand=True)
        if max(image.size) > side:
            scale = side / max(image.size)
            image = image.resize(
                (max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BILINEAR
            )
    box = visible_box(image)
    return image.crop(box) if box else image


def visible_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of what an RGBA picture shows (alpha above 24 of 255)."""
    return image.getchannel("A").point([0] * 25 + [255] * 231).getbbox()


def readable_color(
    rng: Random, canvas: Image.Image, box: Box, contrast: float = 100
) -> tuple[str, tuple[int, int, int]] | None:
    """A named text color that stands out from what lies under `box`, or None on too mixed a ground."""
    patch = canvas.crop(tuple(int(v) for v in box)).convert("L").resize((8, 8), Image.Resampling.BOX)  # type: ignore[arg-type]
    values = patch.tobytes()
    low, high = min(values), max(values)
    fits = [n for n in TEXT_COLORS if luminance(COLORS[n]) > high + contrast or luminance(COLORS[n]) < low - contrast]
    if not fits:
        return None
    name = rng.choice(fits)
    return name, COLORS[name]


def text_layer(
    text: str, font: assets.ImageFont.FreeTypeFont, color: tuple[int, int, int], angle: float = 0.0
) -> tuple[Image.Image, tuple[float, ...]]:
    """Text as an RGBA layer turned by `angle` degrees (counter-clockwise) and its quad in that layer."""
    left, top, right, bottom = font.getbbox(text)
    w, h = int(right - left) + 2, int(bottom - top) + 2
    layer = Image.new("RGBA", (w, h), (*color, 0))
    ImageDraw.Draw(layer).text((1 - left, 1 - top), text, font=font, fill=(*color, 255))
    corners = [(0.0, 0.0), (w, 0.0), (w, h), (0.0, h)]
    if not angle:
        return layer, tuple(float(v) for c in corners for v in c)
    turned = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    a = math.radians(-angle)
    quad = []
    for x, y in corners:
        dx, dy = x - w / 2, y - h / 2
        quad += [
            turned.width / 2 + dx * math.cos(a) - dy * math.sin(a),
            turned.height / 2 + dx * math.sin(a) + dy * math.cos(a),
        ]
    return turned, tuple(quad)
