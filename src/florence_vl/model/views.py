"""Views: named pairs of image size and features, so that the resolution can depend on the question.

A view changes the number of image placeholders, so it is chosen before tokenization: `processor(..., view="glance")`.
Features outside a view are not computed in inference and replaced by their mean (`FeatureFill`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from florence_vl.registry import did_you_mean

FULL_VIEW = "full"  # the processor's own size with all features; every model has it


def check_views(views: Any, features: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The views of a config, checked and completed.

    Args:
        views: Name -> `{"size": pixels per side, "features": names}`; both are optional.
        features: The model's features; the first is part of every view.

    Raises:
        ValueError: Not a valid mapping, an unknown feature (similar names are suggested), or a view without the first.
    """
    if not isinstance(views, Mapping):
        raise ValueError(f"views must be a mapping of names, found {views!r}")
    result = {}
    for name, view in views.items():
        if not isinstance(view, Mapping) or set(view) - {"size", "features"}:
            raise ValueError(f"views[{name!r}] must have the keys size and features, found {view!r}")
        if name == FULL_VIEW:
            raise ValueError(
                f"{FULL_VIEW!r} names the view with the processor's size and all features; rename this one"
            )
        chosen = list(view.get("features") or features)
        for feature in chosen:
            if feature not in features:
                raise ValueError(f"views[{name!r}]: unknown feature {feature!r}. {did_you_mean(feature, features)}")
        if features[0] not in chosen:
            raise ValueError(f"views[{name!r}] lacks the feature {features[0]!r}, which is part of every view")
        size = view.get("size")
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"views[{name!r}]: size must be pixels per side, found {size!r}")
        result[str(name)] = {"size": size, "features": [feature for feature in features if feature in chosen]}
    return result


def feature_mask(features: Sequence[str], chosen: Iterable[str]) -> list[int]:
    """1 for each of `features` that is `chosen`, else 0."""
    wanted = set(chosen)
    return [int(feature in wanted) for feature in features]


class FeatureFill(nn.Module):
    """Replacement of features that were not computed: one vector (D,) per feature, zero until estimated.

    Args:
        feature_dims: Channels D of each feature by name.
    """

    def __init__(self, feature_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.feature_names = tuple(feature_dims)
        for name, dim in feature_dims.items():
            self.register_parameter(f"mean_{name}", nn.Parameter(torch.zeros(dim)))

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """The vectors by feature name."""
        return {name: self.get_parameter(f"mean_{name}") for name in self.feature_names}

    def reset_parameters(self) -> None:
        """Zero the parameters that `from_pretrained` has not loaded."""
        for vector in self.vectors.values():
            init.zeros_(vector)

    def forward(self, features: Mapping[str, Tensor], mask_BF: Tensor) -> dict[str, Tensor]:
        """Replace the features (B, N, D) where the mask, one column per feature in their order, is 0."""
        mask_BF = mask_BF.to(next(iter(features.values())).device, torch.bool)
        vectors = self.vectors
        return {
            name: torch.where(mask_BF[:, index, None, None], feature_BND, vectors[name].to(feature_BND.dtype))
            for index, (name, feature_BND) in enumerate(features.items())
        }

    @torch.no_grad()
    def estimate(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Set the vectors to the means of the features over images and tokens.

        Args:
            batches: Features of images by name, (B, N, D).

        Returns:
            The number of images.

        Raises:
            ValueError: There are no images.
        """
        # On the CPU, as MPS has no float64.
        sums = {name: torch.zeros(vector.shape, dtype=torch.float64) for name, vector in self.vectors.items()}
        images = tokens = 0
        for features in batches:
            for name, feature_BND in features.items():
                sums[name] += feature_BND.cpu().double().sum((0, 1))
            images += feature_BND.shape[0]
            tokens += feature_BND.shape[0] * feature_BND.shape[1]
        if not images:
            raise ValueError("the means of the features need at least one image")
        for name, vector in self.vectors.items():
            vector.copy_(sums[name] / tokens)
        return images
