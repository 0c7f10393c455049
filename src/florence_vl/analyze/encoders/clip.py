"""OpenAI's CLIP, contrastive image-text pretraining; the paper's Figures 3 and 4 have L/14 at 336 px."""

from __future__ import annotations

from florence_vl.analyze.encoders.backbone import register_hub_encoder

register_hub_encoder("clip_base", "openai/clip-vit-base-patch16")
register_hub_encoder("clip_large", "openai/clip-vit-large-patch14")
register_hub_encoder("clip_large_336", "openai/clip-vit-large-patch14-336")
