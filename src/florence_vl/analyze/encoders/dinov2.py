"""DINOv2 (G, L, B, S), self-supervised; the paper's Figure 4 has G, L and B."""

from __future__ import annotations

from florence_vl.analyze.encoders.backbone import register_hub_encoder

for _size in ("small", "base", "large", "giant"):
    register_hub_encoder(f"dinov2_{_size}", f"facebook/dinov2-{_size}")
