"""Where downloaded and converted parts are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: `$FLORENCE_VL_CACHE`, else `$XDG_CACHE_HOME/florence-vl`, else `~/.cache/florence-vl`."""
    explicit = os.environ.get("FLORENCE_VL_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "florence-vl"
