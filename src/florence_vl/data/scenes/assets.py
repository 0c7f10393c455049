"""What scenes are made of: named sprites, fonts and words from the florence-vl-mini package, divided by split."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

SPLITS = ("train", "val", "test")

# CLDR subgroups whose members a person would name as the list does.
_NAMEABLE = set(
    "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug plant-flower plant-other "
    "food-fruit food-vegetable food-prepared food-asian food-marine food-sweet drink dishware place-building "
    "transport-ground transport-water transport-air time event award-medal sport arts-crafts clothing music "
    "musical-instrument phone computer light-video book-paper money mail writing office lock tool science medical "
    "household face-glasses face-hat face-costume heart sky-weather emotion".split()
)
_OBSCURE = set(
    "light rail|suspension railway|articulated lorry|auto rickshaw|trolleybus|minibus|tram car|card index dividers|"
    "card index|card file box|bookmark tabs|label|tear-off calendar|control knobs|level slider|black nib|trackball|"
    "computer disk|optical disk|dvd|videocassette|clamp|alembic|petri dish|link|broken chain|chains|crutch|wastebasket|"
    "fish cake with swirl|oden|dango|tamale|falafel|fondue|rice cracker|stuffed flatbread|flatbread|custard|mate|"
    "sauropod|root vegetable|ginger root|leafy green|cut of meat|canned food|pouring liquid|beverage box|"
    "japanese castle|japanese post office|derelict house|department store|convenience store|hindu temple|synagogue|"
    "shinto shrine|mosque|hotel|bank|post office|stadium|hut|wood|rock|brick|motorway|construction|seat|ring buoy|"
    "oil drum|carp streamer|tanabata tree|wind chime|moon viewing ceremony|red envelope|firecracker|admission tickets|"
    "reminder ribbon|sports medal|military medal|1st place medal|2nd place medal|3rd place medal|goal net|flying disc|"
    "curling stone|mahjong red dragon|flower playing cards|joker|pool 8 ball|framed picture|thread|yarn|knot|"
    "performing arts|safety vest|sari|thong sandal|one-piece swimsuit|briefs|ballet shoes|flat shoe|folding hand fan|"
    "hair pick|prayer beads|rescue worker's helmet|musical score|postal horn|long drum|pager|diya lamp|film frames|"
    "ledger|page with curl|page facing up|rolled-up newspaper|yen banknote|chart increasing with yen|coin|memo|"
    "linked paperclips|file cabinet|locked with pen|locked with key|old key|nut and bolt|white cane|hook|"
    "satellite antenna|x-ray|adhesive bandage|plunger|lotion bottle|roll of paper|bubbles|mouse trap|safety pin|"
    "front-facing baby chick|ewe|water buffalo|two-hump camel|ox|ram|boar|bison|dodo|phoenix|wing|orca|oyster|fly|"
    "rosette|white flower|herb|sheaf of rice|fallen leaf|leaf fluttering in wind|empty nest|leafless tree|hyacinth|"
    "lotus|microbe|cockroach|worm|spouting whale|wilted flower|blossom|hibiscus|peanuts|olive|beans|brown mushroom|"
    "shallow pan of food|pot of food|bento box|curry rice|roasted sweet potato|moon cake|shaved ice|jar|amphora|"
    "teacup without handle|baby bottle|hot beverage|poultry leg|meat on bone|fried shrimp|steaming bowl|cooking|"
    "cup with straw|fork and knife with plate|sled|water pistol|slot machine|crystal ball|magic wand|nesting dolls|"
    "mirror ball|bullseye|yo-yo|diving mask|running shirt|martial arts uniform|field hockey|lacrosse|"
    "ice hockey|cricket game|badminton|bowling|volleyball|rugby football|softball|in-hole|flag in hole|fishing pole|"
    "fog|foggy|cyclone|wind face|dizzy|collision|speech balloon|hundred points|milky way|comet|water wave|"
    "snowman without snow|umbrella on ground|sun behind small cloud|sun behind large cloud|sun behind rain cloud|"
    "airplane departure|airplane arrival|aerial tramway|mountain cableway|mountain railway|railway track|station|metro|"
    "hourglass done|timer clock|mantelpiece clock|heart exclamation|mending heart|revolving hearts|grey heart|"
    "beating heart|growing heart|two hearts|heart decoration|heart on fire|sparkling heart|pouring|electric plug|"
    "low battery|mobile phone with arrow|telephone receiver|fax machine|notebook with decorative cover|notebook|"
    "orange book|green book|blue book|closed book|e-mail|postbox|file folder|open file folder|spiral notepad|"
    "spiral calendar|clipboard|round pushpin|unlocked|carpentry saw|wheel|radio|office building|house with garden|houses|bookmark|locked|tennis|golf|ping pong|skiis|skis|american football|baseball field|backpack|building construction|desert island|national park".split(
        "|"
    )
)
_CLIP_ART = set(
    "house|school|guitar|boat|teddy bear|soccer ball|floppy disk|christmas tree|magnifying glass|padlock|table|bus|"
    "truck|car|chair|lamp|clock|fish|dog|cat|bird|horse|cow|pig|frog|apple|orange|pear|banana|lemon|strawberry|cherry|"
    "umbrella|hat|shoe|key|flower|tree|mushroom|computer|television|camera|telephone|drum|piano|violin|trumpet|"
    "hammer|scissors|pencil|ladder|saw|cup|bottle|fork|spoon|candle|star|balloon|kite|ball|butterfly|bee|spider|snail|"
    "turtle|snake|rabbit|duck|owl|penguin|elephant|lion|tiger|bear|monkey|giraffe|airplane|helicopter|rocket|"
    "sailboat|bicycle|motorcycle|train|tractor|barn|castle|windmill|lighthouse|pizza|cake|ice cream cone|"
    "hamburger|sandwich|carrot|tomato|onion|corn|pumpkin|pineapple|grapes|watermelon|pumpkin pie|harp|paper clip".split(
        "|"
    )
)
_MASS = set(
    "popcorn bacon bread butter garlic salt money ice fire coral broccoli spaghetti sushi soap dna rice corn "
    "candy honey confetti".split()
)
_PLURAL = set(
    "grapes cherries blueberries peanuts beans pancakes scissors chopsticks glasses sunglasses goggles jeans socks "
    "gloves shorts headphones books maracas".split()
) | {"french fries", "clinking glasses", "fork and knife", "couch and lamp", "bow and arrow", "musical notes"}
_IRREGULAR = {"mouse": "mice", "goose": "geese", "fish": "fish", "deer": "deer", "foot": "feet", "tooth": "teeth",
              "leaf": "leaves", "knife": "knives", "wolf": "wolves", "shrimp": "shrimps", "moose": "moose",
              "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "scarf": "scarves", "squid": "squid",
              "bison": "bison", "person": "people", "child": "children", "buffalo": "buffalo"}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Sprite:
    """One cut-out picture with its name.

    Args:
        id: Its id in the package's index.
        name: What it shows, without an article.
        category: "animal", "fruit", ... or None.
        related: Words that would make another name ambiguous beside it.
        style: "fluent", "noto" or "openclipart".
        new_concept: No picture of this concept belongs to the training split.
    """

    id: str
    name: str
    category: str | None
    related: frozenset[str]
    style: str
    new_concept: bool

    @property
    def countable(self) -> bool:
        """Whether "two ...s" is good English."""
        return (
            self.name not in _PLURAL
            and self.name not in _MASS
            and not re.search(r" (with|of|in|and|behind|on) ", self.name)
        )

    def conflicts(self, other: Sprite) -> bool:
        """Whether a person might call one of the two by the other's name."""
        mine, theirs = set(_words(self.name)), set(_words(other.name))
        if mine & (theirs | other.related) or theirs & (mine | self.related):
            return True
        # cupcake ~ cake, paintbrush ~ paint
        return any(a in b or b in a for a in mine for b in theirs if min(len(a), len(b)) > 3)


def _words(text: str) -> list[str]:
    generic = {
        "face",
        "with",
        "and",
        "of",
        "in",
        "on",
        "behind",
        "red",
        "green",
        "blue",
        "yellow",
        "black",
        "white",
        "the",
    }
    return [w.removesuffix("s") for w in re.findall(r"[a-z']+", text.lower()) if w not in generic]


def with_article(name: str) -> str:
    """ "a dog", "an owl", "some popcorn", "scissors"."""
    bare = re.sub("^(large|small) ", "", name)
    if bare in _MASS:
        return f"some {name}"
    if bare in _PLURAL:
        return name
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "one", "eu", "use"))
    return f"an {name}" if vowel or name.startswith(("hour", "x-")) else f"a {name}"


def plural(name: str) -> str:
    """The plural of a countable name."""
    head, _, last = name.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith("fish"):
        pass
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    else:
        last += "s"
    return f"{head} {last}".strip()


def counted(name: str, n: int) -> str:
    """ "a dog", "two dogs"."""
    return with_article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}"


def _package() -> Any:
    try:
        import florence_vl_mini
    except ImportError as error:
        raise ModuleNotFoundError(
            "scenes need the pictures and fonts of florence-vl-mini: pip install ./packages/florence-vl-mini"
        ) from error
    return florence_vl_mini


def _nameable(row: dict[str, Any]) -> bool:
    name = row["caption"]
    if row["set"] == "openclipart":
        return name in _CLIP_ART
    if name in _OBSCURE or len(name) > 24 or len(name.split()) > 4 or not name.isascii():
        return False
    folder = row["folder"].replace(" & ", "-").replace(" ", "-")
    return folder in _NAMEABLE or any(
        folder.startswith(f) for f in ("face", "heart", "emotion", "sky", "light", "arts")
    )


@lru_cache
def sprites(split: str) -> tuple[Sprite, ...]:
    """Named sprites of a split, in the index's order."""
    out = []
    for row in _package().load_index():
        if row["split"] == split and _nameable(row):
            # a tag that is a word of the name, or of another name, marks synonyms: automobile ~ car, cat face ~ cat
            related = frozenset(w for k in row["keywords"][:40] for w in _words(k))
            out.append(Sprite(row["id"], row["caption"], row["category"], related, row["set"], row["new_concept"]))
    return tuple(out)


@lru_cache
def by_category(split: str) -> dict[str, tuple[Sprite, ...]]:
    """Sprites of a split by category, only those that have one."""
    groups: dict[str, list[Sprite]] = defaultdict(list)
    for sprite in sprites(split):
        if sprite.category:
            groups[sprite.category].append(sprite)
    return {name: tuple(group) for name, group in groups.items()}


@lru_cache
def _rows() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in _package().load_index()}


@lru_cache(maxsize=4096)
def picture(sprite_id: str) -> Image.Image:
    """The RGBA picture of a sprite; do not change it in place."""
    return _package().open_sprite(_rows()[sprite_id])


@lru_cache
def font_files() -> tuple[Path, ...]:
    """The package's fonts."""
    return tuple(_package().font_paths())


@lru_cache(maxsize=512)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at a pixel size."""
    return ImageFont.truetype(str(path), size)


def sans(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The plain font of labels in charts and documents."""
    name = "LiberationSans-Bold.ttf" if bold else "LiberationSans-Regular.ttf"
    return font(next(p for p in font_files() if p.name == name), size)


@lru_cache
def words(split: str) -> tuple[str, ...]:
    """Words for text in pictures, 3 to 8 letters; every word belongs to one split."""
    cuts = {"train": (0.0, 0.9), "val": (0.9, 0.94), "test": (0.94, 1.0)}
    low, high = cuts[split]
    return tuple(w for w in _package().words() if len(w) <= 8 and low <= _unit(w) < high)


def _unit(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


@lru_cache
def photo_textures() -> tuple[Image.Image, ...]:
    """Grass, gravel, brick and sky photographs for busy backgrounds."""
    wanted = ("brick", "grass", "gravel", "hubble_deep_field")
    return tuple(Image.open(p["file"]).convert("RGB") for p in _package().photos() if p["id"] in wanted)
