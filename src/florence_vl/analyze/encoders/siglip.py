"""SigLIP and SigLIP 2: pretraining with a pairwise sigmoid loss. The paper's Figure 4 has so400m at 384 px."""

from __future__ import annotations

from florence_vl.analyze.encoders.backbone import register_hub_encoder

register_hub_encoder("siglip_base", "google/siglip-base-patch16-224")
register_hub_encoder("siglip_so400m", "google/siglip-so400m-patch14-384")
register_hub_encoder("siglip2_base", "google/siglip2-base-patch16-224")
register_hub_encoder("siglip2_so400m", "google/siglip2-so400m-patch14-384")
