"""Scores of images by name: the words of tables for each, and how it is written."""

from __future__ import annotations

from cspd.tools.judge.bootstrap import score_text

# Name in the records: words, format.
SCORES = {
    "accuracy": ("accuracy", ".1%"),
    "real_accuracy": ("accuracy of real images", ".1%"),
    "frechet": ("Frechet distance", ".1f"),
    "frechet_test": ("Frechet distance to test images", ".1f"),
    "frechet_floor": ("Frechet distance of real images", ".1f"),
    "inception_score": ("Inception score", ".2f"),
    "inception_score_std": ("deviation of the Inception score", ".2f"),
    "precision": ("precision", ".1%"),
    "recall": ("recall", ".1%"),
    "diversity": ("diversity", ".2f"),
    "diversity_min": ("diversity, least of a class", ".2f"),
}


def words(name: str) -> str:
    """What tables call the score `name`."""
    return SCORES[name][0]


def text(name: str, value: float, ends: list[float] | None = None) -> str:
    """The score `name` with half its 95 % interval, if it has one."""
    return score_text(value, ends, SCORES[name][1])


def difference_text(name: str, value: float, ends: list[float] | None = None) -> str:
    """A difference of two scores `name`, signed."""
    return ("+" if value >= 0 else "") + text(name, value, ends)
