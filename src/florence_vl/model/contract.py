"""Strict loading: missing, unexpected or mismatched weights are errors that name the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SHOWN = 5  # names in an error message


def check_loading(
    report: Mapping[str, Any],
    source: Any,
    ignore_mismatched_sizes: bool = False,
    ignore_unexpected: bool = False,
    unused: str | None = None,
) -> None:
    """Raise an error where `from_pretrained` of transformers only warns and initializes missing weights randomly.

    Args:
        report: Loading report of `output_loading_info=True`.
        source: Folder or hub id, for the error message.
        ignore_mismatched_sizes: Whether the caller accepts new weights if shapes differ.
        ignore_unexpected: Whether the caller loads only a part of the checkpoint.
        unused: Pattern for names of weights that the caller does not use and that may be missing.

    Raises:
        ValueError: Weights do not fit; the message gives their number and the first names.
    """
    missing = {key for key in report.get("missing_keys", ()) if unused is None or not re.search(unused, key)}
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report.get("mismatched_keys", ())}
    faults = []
    if missing - mismatched:
        faults.append(f"{_names(missing - mismatched)} missing")
    if mismatched and not ignore_mismatched_sizes:
        faults.append(f"{_names(mismatched)} with a shape other than in the config")
    if report.get("unexpected_keys") and not ignore_unexpected:
        faults.append(f"{_names(report['unexpected_keys'])} not part of this model")
    if faults:
        raise ValueError(
            f"the weights of {source} do not fit its config: {'; '.join(faults)}. The checkpoint is damaged or belongs "
            "to another model: download or export it again (`florence-vl convert` reads other layouts)"
        )


def load_whole(cls: Any, source: str | Path, unused: str | None = None, **options: Any) -> Any:
    """`cls.from_pretrained(source, **options)` of a part, which must be complete. No remote code runs.

    Raises:
        ValueError: See `check_loading`; or a file is damaged.
    """
    from safetensors import SafetensorError

    try:
        model, report = cls.from_pretrained(str(source), output_loading_info=True, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise ValueError(f"{_damaged(Path(source))} is damaged ({error}): download it again") from error
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
