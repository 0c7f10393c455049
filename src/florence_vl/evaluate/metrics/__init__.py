"""Metrics and strict parsers of answers by name, without heavy dependencies."""

from florence_vl.evaluate.metrics import choice, documents, judged, reasoning, short, vqa, yes_no
from florence_vl.evaluate.metrics.base import KINDS, METRICS, Metric, Units, Verdict, score_all, stratify
from florence_vl.evaluate.metrics.choice import parse_choice, substring_match
from florence_vl.evaluate.metrics.documents import anls, relaxed_match
from florence_vl.evaluate.metrics.vqa import vqa_accuracy
from florence_vl.evaluate.metrics.yes_no import parse_yes_no

__all__ = [
    "KINDS",
    "METRICS",
    "Metric",
    "Units",
    "Verdict",
    "anls",
    "choice",
    "documents",
    "judged",
    "parse_choice",
    "parse_yes_no",
    "reasoning",
    "relaxed_match",
    "score_all",
    "short",
    "stratify",
    "substring_match",
    "vqa",
    "vqa_accuracy",
    "yes_no",
]
