"""Normalization of short answers as in the VQA, EvalAI and DocVQA evaluation servers, and edit distance."""

from __future__ import annotations

import re
import string

# The official VQA evaluation script's tables (github.com/GT-Vision-Lab/VQA, vqaEval.py).
_CONTRACTED = """
aint arent cant couldve couldnt couldn'tve couldnt've didnt doesnt dont hadnt hadnt've hadn'tve hasnt havent hed
hed've he'dve hes howd howll hows isnt itd itd've it'dve itll maam mightnt mightnt've mightn'tve mightve mustnt mustve
neednt notve oclock oughtnt ow's'at 'ows'at 'ow'sat shant shed've she'dve shouldve shouldnt shouldnt've shouldn'tve
somebody'd somebodyd've somebody'dve somebodyll somebodys someoned someoned've someone'dve someonell someones
somethingd somethingd've something'dve somethingll thats thered thered've there'dve therere theres theyd theyd've
they'dve theyll theyre theyve twas wasnt wed've we'dve weve werent whatll whatre whats whatve whens whered wheres
whereve whod whod've who'dve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldnt've wouldn'tve yall yall'll
y'allll yall'd've y'alld've y'all'dve youd youd've you'dve youll youre youve
"""
_EXPANDED = """
ain't aren't can't could've couldn't couldn't've couldn't've didn't doesn't don't hadn't hadn't've hadn't've hasn't
haven't he'd he'd've he'd've he's how'd how'll how's isn't it'd it'd've it'd've it'll ma'am mightn't mightn't've
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at 'ow's'at 'ow's'at shan't she'd've
she'd've should've shouldn't shouldn't've shouldn't've somebodyd somebody'd've somebody'd've somebody'll somebody's
someone'd someone'd've someone'd've someone'll someone's something'd something'd've something'd've something'll that's
there'd there'd've there'd've there're there's they'd they'd've they'd've they'll they're they've 'twas wasn't we'd've
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've wouldn't've y'all y'all'll y'all'll y'all'd've
y'all'd've y'all'd've you'd you'd've you'd've you'll you're you've
"""
CONTRACTIONS = dict(zip(_CONTRACTED.split(), _EXPANDED.split(), strict=True))
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = [
    ";",
    "/",
    "[",
    "]",
    '"',
    "{",
    "}",
    "(",
    ")",
    "=",
    "+",
    "\\",
    "_",
    "-",
    ">",
    "<",
    "@",
    "`",
    ",",
    "?",
    "!",
]
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d)(\,)+(?=\d)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def strip_punctuation(text: str) -> str:
    """Punctuation as in the VQA script: removed next to a space or in numbers with commas, otherwise made a space."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        glued = not (mark + " " in text or " " + mark in text or in_number)
        out = out.replace(mark, " " if glued else "")
    return _PERIOD.sub("", out)


def strip_articles(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_normalize(text: str) -> str:
    """The official normalization of VQAv2 (punctuation, digits, articles, contractions)."""
    return strip_articles(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def evalai_normalize(text: str) -> str:
    """The EvalAI normalization of TextVQA and VizWiz (MMF's `EvalAIAnswerProcessor`)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_normalize(text)


def plain_normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces: exact match as in lmms-eval with both `ignore_` flags."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance between two texts."""
    if len(one) < len(other):
        one, other = other, one
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]
