"""A recipe's model without weights, for plans and dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.model import loading
from florence_vl.model.assemble import build_model
from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.packaged import resolve
from florence_vl.model.processing import FlorenceVLProcessor
from florence_vl.train.config import Recipe
from florence_vl.train.flops import build_shell
from florence_vl.train.model import NO_MODEL, set_images
from florence_vl.train.plan import recipe_that_writes

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


def load_shell(recipe: Recipe) -> tuple[FlorenceVLForConditionalGeneration, Any]:
    """The recipe's model on the meta device, without weights, and its processor.

    A `model.path` that another recipe will write is built as that recipe says.

    Raises:
        ValueError: As `load_model`.
        FileNotFoundError: As `load_model`.
    """
    path, build = recipe.model.path, recipe.model.build
    if path is not None:
        saved = (Path(resolve(path, "models")) / "config.json").is_file()
        other = None if saved else recipe_that_writes(path)
        if other is not None:
            model, processor = load_shell(other)
        else:
            folder = loading.check_folder(path)
            model = build_shell(FlorenceVLConfig.from_pretrained(folder))
            processor = FlorenceVLProcessor.from_pretrained(folder)
    elif build is not None:
        model, processor = build_model(build, weights=False)
    else:
        raise ValueError(NO_MODEL)
    if recipe.model.changes:
        model.config.update(recipe.model.changes)
        model.config.check()
        model = build_shell(model.config)
    set_images(recipe, model, processor)
    return model, processor
