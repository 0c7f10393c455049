"""`florence-vl recipes`: list recipes, and show one resolved, with the origin of each value."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List and show training recipes.",
    epilog="""[bold]Examples[/bold]

  florence-vl recipes list

  florence-vl recipes show paper/8b-pretrain

  florence-vl recipes show mini/finetune optimizer.lr=1e-4 --yaml > my.yaml""",
)


@app.command("list")
def list_command(
    contains: str = typer.Argument("", help="Only recipes whose name contains this."),
) -> None:
    """List the names and descriptions of all recipes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from florence_vl.registry import did_you_mean
    from florence_vl.train.recipes import list_recipes, load_recipe

    found = list_recipes()
    names = [name for name in found if contains in name]
    if not names:
        raise ValueError(f"no recipe's name contains {contains!r}. {did_you_mean(contains, found)}")
    console = Console()
    if not console.is_terminal:  # one plain line per recipe, for grep
        for name in names:
            print(f"{name}\t{load_recipe(found[name]).description}")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("description")
    for name in names:
        table.add_row(*map(Text, (name, load_recipe(found[name]).description)))
    console.print(table)


@app.command("show")
def show_command(
    recipe: str = typer.Argument(..., help="Name or path of a recipe."),
    overrides: list[str] = typer.Argument(None, help="Overrides, key.path=value.", show_default=False),
    yaml: bool = typer.Option(False, "--yaml", help="Print only the resolved recipe, as YAML to edit."),
) -> None:
    """Show the resolved and validated recipe, with the file that each value comes from."""
    import yaml as yaml_library

    from florence_vl.train.recipes import resolve_recipe

    resolved = resolve_recipe(recipe, overrides or [])
    content = resolved.recipe.to_dict()
    if yaml:
        print(yaml_library.safe_dump(content, sort_keys=False, allow_unicode=True), end="")
        return
    rows = [(path, _value(content, path), origin) for path, origin in resolved.origins.items()]
    width = max(len(path) + len(value) for path, value, _ in rows if len(value) < 40) + 4
    for path, value, origin in rows:
        print(f"{path}: {value}".ljust(min(width, 78)) + f"  # {origin}")


def _value(content: object, path: str) -> str:
    import json

    node = content
    for piece in path.split("."):
        node = node[int(piece)] if isinstance(node, list) else node[piece]  # type: ignore[index]
    return json.dumps(node, ensure_ascii=False)
