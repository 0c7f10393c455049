"""transformers finds the classes for either import order of the two packages; each order in a fresh process."""

import subprocess
import sys

import pytest

CHECK = """
import sys, transformers, florence_vl
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto as tables
assert transformers is sys.modules["transformers"], "the live module"
for name in ("FlorenceVLConfig", "FlorenceVLModel", "FlorenceVLForConditionalGeneration", "FlorenceVLProcessor"):
    assert getattr(transformers, name) is getattr(florence_vl, name), name
config = AutoConfig.for_model("florence_vl")
assert type(config) is florence_vl.FlorenceVLConfig
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    assert auto._model_mapping[type(config)] is florence_vl.FlorenceVLForConditionalGeneration
for table in (tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    assert table["florence_vl"] == "FlorenceVLForConditionalGeneration"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import florence_vl; import importlib.util as u; u.find_spec('transformers'); import transformers",
        "import transformers; import florence_vl",
        "from transformers import AutoProcessor; import florence_vl",
        "from florence_vl.model.towers import TOWERS",
    ],
)
def test_any_order_of_imports(imports):
    done = subprocess.run([sys.executable, "-c", imports + CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_imports_nothing_heavy():
    code = """
import sys, florence_vl, florence_vl.model, florence_vl.train.config
assert "load" in dir(florence_vl)
heavy = {"torch", "transformers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_serve_knows_the_modality(tmp_path):
    from transformers.cli.serving.model_manager import ModelManager

    from florence_vl.model.tiny import tiny_model

    model, _ = tiny_model()
    assert ModelManager.get_model_modality(model).name == "MULTIMODAL"
