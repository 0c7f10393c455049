"""A load is a contract: weights that are missing, unexpected or of another shape are refused, with their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SHOWN = 5  # names in an error text


def check_loading(
    report: Mapping[str, Any],
    source: Any,
    ignore_mismatched_sizes: bool = False,
    ignore_unexpected: bool = False,
    unused: str | None = None,
) -> None:
    """Refuse what transformers' `from_pretrained` only warns of: it would fill missing weights with random numbers.

    Args:
        report: What `output_loading_info=True` returns.
        source: Folder or hub id, for the error text.
        ignore_mismatched_sizes: The caller asked for new weights where shapes differ.
        ignore_unexpected: The caller takes a part of the checkpoint.
        unused: Pattern of the names of weights that the caller does not use, which may be missing.

    Raises:
        ValueError: Naming how many weights, and the first of them.
    """
    missing = {key for key in report.get("missing_keys", ()) if unused is None or not re.search(unused, key)}
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report.get("mismatched_keys", ())}
    faults = []
    if missing - mismatched:
        faults.append(f"{_names(missing - mismatched)} missing")
    if mismatched and not ignore_mismatched_sizes:
        faults.append(f"{_names(mismatched)} of another shape than its config says")
    if report.get("unexpected_keys") and not ignore_unexpected:
        faults.append(f"{_names(report['unexpected_keys'])} not part of this model")
    if faults:
        raise ValueError(
            f"the weights of {source} do not fit its config: {'; '.join(faults)}. The checkpoint is damaged, or of "
            "another model: fetch or export it again (`florence-vl convert` reads other layouts)"
        )


def load_whole(cls: Any, source: str | Path, unused: str | None = None, **options: Any) -> Any:
    """`cls.from_pretrained(source, **options)` of a part, refused when weights are missing. No remote code runs.

    Raises:
        ValueError: See `check_loading`; or a file is damaged.
    """
    from safetensors import SafetensorError

    try:
        model, report = cls.from_pretrained(str(source), output_loading_info=True, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise ValueError(f"{_damaged(Path(source))} is damaged ({error}): fetch it again") from error
    check_loading(report, source, ignore_unexpected=True, unused=unused)
    return model


def _names(keys: Iterable[Any]) -> str:
    names = sorted(str(key) for key in keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weights ({', '.join(names[:SHOWN])}{more})"


def _damaged(folder: Path) -> Path:
    """The first weights file of a folder that cannot be opened."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return folder
