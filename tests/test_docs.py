"""README, docs and messages refer only to existing links, commands, flags, make targets, extras and files."""

import re
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import typer

from florence_vl.cli.main import build_app, commands
from florence_vl.train.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "packages/florence-vl-mini/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]
CODE = [
    *sorted((ROOT / "src").rglob("*.py")),
    *sorted((ROOT / "src").rglob("*.yaml")),
    *sorted((ROOT / "packages/florence-vl-mini/src").rglob("*.py")),
    *sorted((ROOT / "packages/florence-vl-mini/src").rglob("*.yaml")),
    ROOT / "Makefile",
    *sorted((ROOT / "docs").rglob("*.sh")),
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}, which does not exist"


def command_lines(text: str) -> list[str]:
    """Every line `florence-vl ...` of code blocks and of examples."""
    text = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"^\s*(?:\$ |[\w:]+=\S+ |\S*/|.*-m )?florence[-_]vl ([a-z][\w-]*\b[^\n]*)", text, re.MULTILINE)


def command_spans(text: str) -> list[str]:
    """Every `florence-vl ...` in backticks, which may leave out arguments."""
    return re.findall(r"`florence-vl ([a-z][\w-]*\b[^`\n]*)`", text)


@lru_cache
def command_tree(name: str):
    return typer.main.get_command(build_app(name)).commands[name]


def check_command(line: str, whole: bool) -> str | None:
    """The error of a command line; None if it has none.

    Args:
        line: What follows `florence-vl`.
        whole: Check that no required argument or option is missing, too.
    """
    line = re.split(r"\s+#\s|\s\|\s|\s>\s|\s&&\s|\.\s", line)[0]
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # the closing quote of the code's own string
        words = line.split()
    words = [word.strip("`'\".,;:)") for word in words]
    if words[0] not in commands():
        return f"no command {words[0]!r}"
    node, rest = command_tree(words[0]), words[1:]
    path = words[0]
    while getattr(node, "commands", None):
        group = node.commands
        if not rest or not re.fullmatch(r"[a-z][a-z0-9-]*", rest[0]):
            break
        if rest[0] not in group:
            return f"`florence-vl {path}` has no command {rest[0]!r}"
        path, node, rest = f"{path} {rest[0]}", group[rest[0]], rest[1:]
    known = {flag for parameter in node.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    known |= {"--debug", "--version"}
    for word in rest:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]*", flag) and flag not in known and len(flag) > 1:
            return f"`florence-vl {path}` has no flag {flag!r}"
    try:
        node.make_context(path, list(rest))
    except Exception as error:  # of click, or of the click inside newer typers; a shell variable is no valid value
        return error.format_message() if whole and type(error).__name__ == "MissingParameter" else None
    return None


@pytest.mark.parametrize("page", [*PAGES, *CODE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(FENCE.findall(text)) if page.suffix == ".md" else text
    calls = [(line, True) for line in command_lines(blocks)]
    calls += [(line, False) for line in (*command_lines(text), *command_spans(text))]
    assert not [f"{line!r}: {problem}" for line, whole in calls if (problem := check_command(line, whole)) is not None]


def test_a_missing_option_of_a_command_is_found():
    assert check_command("analyze pca picture.png --out runs/pca", whole=True) == "Missing option '--encoder' / '-e'."
    assert check_command("analyze pca picture.png --out runs/pca", whole=False) is None
    assert check_command('train mini/pretrain"""', whole=True) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_recipes_targets_extras_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    recipes = list_recipes()
    for name in re.findall(r"florence[-_]vl (?:train|plan) (?:--[\w-]+ )*([a-z0-9_.-]+/[\w./-]+)", text):
        if not name.endswith((".yaml", ".yml")):
            assert name in recipes, f"{page.name} names the recipe {name}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name} names `make {target}`"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{page.name} names the extra [{extra}]"
    for file in re.findall(r"\b((?:benchmarks|docs|src|tests|packages)/[\w./-]+\.(?:py|md|sh|yaml))\b", text):
        assert (ROOT / file).is_file(), f"{page.name} names {file}, which does not exist"


def test_every_extra_is_described():
    started = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| extra \| for \|\n(.*?)\n\n", started, re.MULTILINE | re.DOTALL)[1]
    described = {extra for row in rows.splitlines() for extra in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", project, re.MULTILINE | re.DOTALL)[1]
    assert described == set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def test_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert missing == []


def test_no_address_of_one_machine():
    for page in [*PAGES, *CODE]:
        assert not re.search(r"/(home|root|Users|work)/", page.read_text(encoding="utf-8")), page.name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("demo", "test", "setup", "lint", "bench"):
        assert f"make {target}" in done.stdout
