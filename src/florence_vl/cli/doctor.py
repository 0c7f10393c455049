"""`florence-vl doctor`: versions, devices, memory, included models, and how to install what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from florence_vl.files import cache_dir

State = Literal["ok", "missing", "broken"]

IMPORTED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "PIL",
)  # must import, not just be installed

epilog = """[bold]Examples[/bold]

  florence-vl doctor

  florence-vl doctor --json"""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        group: Heading in the report.
        name: What was checked.
        state: "ok", "missing" (optional, absent) or "broken" (needed, and absent or unusable).
        found: What was found.
        fix: The command or step that fixes it; empty if nothing is wrong.
    """

    group: str
    name: str
    state: State
    found: str
    fix: str = ""


def _editable_root() -> Path | None:
    """The checkout from which this package is imported, or None."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "florence_vl").is_dir() else None


def _requirement(extra: str = "") -> str:
    suffix = f"[{extra}]" if extra else ""
    root = _editable_root()
    return f"-e '{os.path.relpath(root)}{suffix}'" if root else f"'florence-vl{suffix}'"


def check_packages() -> list[Check]:
    """Check every core dependency against its version range, and each extra."""
    from packaging.requirements import Requirement

    checks = []
    found = platform.python_version()
    fits = sys.version_info >= (3, 10)
    checks.append(Check("packages", "python", "ok" if fits else "broken", found, "" if fits else "use Python >= 3.10"))
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("florence-vl") or ()]
        version = importlib.metadata.version("florence-vl")
        checks.append(Check("packages", "florence-vl", "ok", version))
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install {_requirement()}"
        return [*checks, Check("packages", "florence-vl", "broken", "not installed, only on the path", fix)]

    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = next(
            (name for name in _extras() if requirement.marker and requirement.marker.evaluate({"extra": name})), ""
        )
        lacking = _lacking(requirement.name, str(requirement.specifier))
        if extra:
            extras.setdefault(extra, [])
            if lacking and requirement.name != "florence-vl":
                extras[extra].append(lacking)
        elif requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            fix = f"pip install '{requirement.name}{requirement.specifier}'" if lacking else ""
            state: State = "broken" if lacking else "ok"
            checks.append(Check("packages", requirement.name, state, lacking or _version(requirement.name), fix))
    for extra, missing in extras.items():
        if missing:
            checks.append(
                Check("extras", extra, "missing", "lacks " + ", ".join(missing), f"pip install {_requirement(extra)}")
            )
        else:
            checks.append(Check("extras", extra, "ok", "installed"))
    return checks


def _extras() -> list[str]:
    return importlib.metadata.metadata("florence-vl").get_all("Provides-Extra") or []


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _lacking(distribution: str, specifier: str) -> str:
    """The problem of an installed distribution; empty if it is installed and in range."""
    from packaging.specifiers import SpecifierSet

    try:
        version = _version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return distribution
    return "" if SpecifierSet(specifier).contains(version, prereleases=True) else f"{distribution} {version}"


def check_imports() -> list[Check]:
    """Check that the core libraries import; a wheel for another processor or Python installs but does not import."""
    checks = []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            fix = f"pip install --force-reinstall {'pillow' if name == 'PIL' else name}"
            checks.append(Check("packages", f"import {name}", "broken", line, fix))
    return checks


def check_devices() -> list[Check]:
    """Accelerators, threads, speed of bf16, memory and disk."""
    import psutil

    checks: list[Check] = []
    try:
        import torch

        from florence_vl.model.precision import WORTHWHILE, bf16_gain
    except Exception:
        return checks  # check_imports reports the reason
    gib = 1 << 30
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            text = f"{properties.name}, {properties.total_memory / gib:.0f} GiB, bf16 {torch.cuda.is_bf16_supported()}"
            checks.append(Check("devices", f"cuda:{index}", "ok", text))
    elif shutil.which("nvidia-smi"):
        found = f"an NVIDIA driver, but torch {torch.__version__} finds no GPU"
        fix = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        checks.append(Check("devices", "cuda", "missing", found, fix))
    if torch.backends.mps.is_available():
        checks.append(Check("devices", "mps", "ok", platform.processor() or "Apple GPU"))
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {capability}"
    checks.append(Check("devices", "cpu", "ok", threads))
    gain = bf16_gain()
    advice = "faster" if gain >= WORTHWHILE else "not faster: use float32"
    text = f"{advice} (measured: {gain:.1f} times float32's matrix-product rate)"
    checks.append(Check("devices", "cpu bf16", "ok", text))
    memory = psutil.virtual_memory()
    text = f"{memory.total / gib:.0f} GiB, {memory.available / gib:.0f} GiB free"
    checks.append(Check("devices", "memory", "ok", text))
    folder = cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / gib
    writable = os.access(existing, os.W_OK)
    state: State = "ok" if writable and free >= 2 else "broken"
    fix = "" if state == "ok" else "set FLORENCE_VL_CACHE to a writable folder with 2 GiB free"
    text = f"{folder}, {free:.0f} GiB free{'' if writable else ', not writable'}"
    checks.append(Check("devices", "cache", state, text, fix))
    return checks


def check_parts() -> list[Check]:
    """The models that installed packages provide by name."""
    from florence_vl.model.packaged import KINDS, is_converted
    from florence_vl.registry import plugins

    checks = []
    for kind in KINDS:
        for name, point in plugins(kind).items():
            lacking = [p for p in point.load().parts if not is_converted(p) and p.source() is None]
            if lacking:
                found = f"needs {', '.join(part.requirement for part in lacking)}"
                checks.append(Check("parts", f"{name} ({kind})", "missing", found, lacking[0].install))
            else:
                checks.append(Check("parts", f"{name} ({kind})", "ok", "installed"))
    if not checks:
        in_checkout = (root := _editable_root()) and (root / "packages" / "florence-vl-mini").is_dir()
        fix = f"pip install {'-e packages/florence-vl-mini' if in_checkout else 'florence-vl-mini'}"
        checks.append(Check("parts", "florence-vl-mini", "missing", "the included models, pictures and demo", fix))
    return checks


def command(
    as_json: bool = typer.Option(False, "--json", help="Print the checks as JSON."),
) -> None:
    """Check versions, devices and extras, and show how to install what is missing.

    Exits with 1 if a requirement is broken. torchvision, timm and open-clip are never needed.
    """
    checks = [*check_packages(), *check_imports(), *check_devices(), *check_parts()]
    broken = [check for check in checks if check.state == "broken"]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print(checks)
    if broken:
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    signs = {"ok": "[green]ok[/green]", "missing": "[yellow]--[/yellow]", "broken": "[red]!![/red]"}
    console = Console()
    for group in dict.fromkeys(check.group for check in checks):
        table = Table(
            title=group, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        for check in (check for check in checks if check.group == group):
            found = escape(check.found) + (f"\n[cyan]{escape(check.fix)}[/cyan]" if check.fix else "")
            table.add_row(signs[check.state], escape(check.name), found)
        console.print(table)
        console.print()
    broken = sum(check.state == "broken" for check in checks)
    missing = sum(check.state == "missing" for check in checks)
    verdict = f"[red]{broken} requirements broken[/red]" if broken else "[green]all requirements work[/green]"
    console.print(f"{verdict}; {missing} optional items missing. torchvision, timm and open-clip are never needed.")
