"""Depth-breadth fusion: named features in, one sequence of image tokens out (paper section 3.3).

Shape letters: B images, N tokens of a feature, N' output tokens, D channels of a feature, C output channels.
A new fusion is a class in any module that registers it under an exact name; the contract test then covers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from florence_vl.registry import Registry

FUSIONS: Registry[type[Fusion]] = Registry("fusion")


class Fusion(nn.Module, ABC):
    """Base class: combines the features of an image.

    Args:
        feature_dims: Channels D of each feature by name, in the order of fusion.
    """

    def __init__(self, feature_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.feature_dims = dict(feature_dims)

    @property
    @abstractmethod
    def out_dim(self) -> int:
        """Output channels C."""

    @property
    def uses_context(self) -> bool:
        """Whether the result depends on the question; such results are never cached by the image alone."""
        return False

    def num_tokens(self, num_feature_tokens: int) -> int:
        """Number of output tokens N' for features of `num_feature_tokens` tokens."""
        return num_feature_tokens

    def _check_context(self, context: Tensor | None) -> None:
        if context is None:
            raise ValueError(
                "this fusion depends on the question, but none was given: pass question_ids and question_mask, as "
                "returned by the processor, in addition to pixel_values (a mask of zeros means no text)"
            )

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
        """Fuse the features.

        Args:
            features: Name -> (B, N, D).
            context: (B, H) state of the question for fusions with `uses_context`, zeros if there is no text. Ignored by
                other fusions.

        Returns:
            (B, N', C).
        """

    def ordered(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The features in the order of fusion.

        Raises:
            ValueError: A feature is missing; the message contains both lists.
        """
        missing = [name for name in self.feature_dims if name not in features]
        if missing:
            raise ValueError(f"features {missing} are missing for the fusion; it got {list(features)}")
        return [features[name] for name in self.feature_dims]

    def _same_width(self, kind: str) -> int:
        widths = set(self.feature_dims.values())
        if len(widths) != 1:
            raise ValueError(f"fusion {kind!r} needs features of one width, got {self.feature_dims}; use 'channel'")
        return widths.pop()


def merge_tokens(x_BND: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """Merge squares of `merge` x `merge` neighboring tokens: (B, R C, D) -> (B, R C / merge^2, D merge^2).

    Args:
        x_BND: Tokens of a grid, row by row.
        grid: Rows R and columns C, multiples of `merge`.
        merge: Side of the square.
    """
    if merge == 1:
        return x_BND
    rows, columns = grid
    x_BrmcmD = x_BND.unflatten(1, (rows // merge, merge, columns // merge, merge))
    return x_BrmcmD.transpose(2, 3).flatten(3).flatten(1, 2)


def build_fusion(name: str, feature_dims: Mapping[str, int], **options: Any) -> Fusion:
    """Build the fusion registered under `name`.

    Args:
        name: Registered name.
        feature_dims: Channels of each feature by name, in the order of fusion.
        **options: Further arguments of the class, such as those of the gate.

    Raises:
        ValueError: The name is unknown (similar names are suggested), or the features do not fit the fusion.
    """
    return FUSIONS[name](feature_dims, **options)
