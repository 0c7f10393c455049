"""The registry of encoders, and the notation for users: `name[=weights][:feature+feature][@size]`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from florence_vl.analyze.encoders.base import VisionEncoder
from florence_vl.registry import Registry

# name -> factory(weights=None, features=(), size=None, fit=None) -> VisionEncoder
ENCODERS: Registry[Callable[..., VisionEncoder]] = Registry("encoder")


@dataclass(frozen=True)
class EncoderSpec:
    """Specification of an encoder.

    Args:
        name: Registered name.
        weights: Folder or hub id of the weights; None for the encoder's default.
        features: Features to use, concatenated along channels; empty for the encoder's default.
        size: Side of the square input in pixels; None for the encoder's default.
    """

    name: str
    weights: str | None = None
    features: tuple[str, ...] = ()
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> EncoderSpec:
        """Parse `name[=weights][:feature+feature][@size]`, e.g. `florence2=models/base:davit+caption@384`.

        Raises:
            ValueError: The text does not have this form, or the encoder is unknown.
        """
        match = re.fullmatch(
            r"(?P<name>[\w.-]+)(?:=(?P<weights>.+?))?(?::(?P<features>\w+(?:\+\w+)*))?(?:@(?P<size>\d+))?",
            text,
        )
        if not match:
            raise ValueError(
                f"{text!r} does not name an encoder; expected name[=weights][:feature+feature][@size], "
                "e.g. dinov2_small_focus:layer6+last@448"
            )
        _ = ENCODERS[match["name"]]
        features = tuple(match["features"].split("+")) if match["features"] else ()
        return cls(match["name"], match["weights"], features, int(match["size"]) if match["size"] else None)

    def __str__(self) -> str:
        weights = f"={self.weights}" if self.weights else ""
        features = f":{'+'.join(self.features)}" if self.features else ""
        return f"{self.name}{weights}{features}{f'@{self.size}' if self.size else ''}"

    @property
    def label(self) -> str:
        """The spec for tables and titles, with only the last part of a folder's path."""
        weights = Path(self.weights).name if self.weights else None
        return str(EncoderSpec(self.name, weights, self.features, self.size))

    def load(self, fit: str | None = None) -> VisionEncoder:
        """Load the encoder.

        Raises:
            MissingWeights: The weights are not on this machine; the message gives the download command.
            ValueError: The encoder does not have the feature, or does not support the size.
        """
        return ENCODERS[self.name](weights=self.weights, features=self.features, size=self.size, fit=fit)
