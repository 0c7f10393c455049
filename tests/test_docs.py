"""Links of the documentation lead somewhere, its commands exist, and make's targets are listed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from florence_vl.cli.main import commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    for name in re.findall(r"^(?:\$ )?florence-vl ([a-z][\w-]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert name in commands(), f"{page.name} shows `florence-vl {name}`, which is no command"


def test_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert missing == []


def test_no_address_of_one_machine():
    for page in PAGES:
        assert not re.search(r"/(home|root|Users|work)/", page.read_text(encoding="utf-8")), page.name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("demo", "test", "setup", "lint", "bench"):
        assert f"make {target}" in done.stdout
