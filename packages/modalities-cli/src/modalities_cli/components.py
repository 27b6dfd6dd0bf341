"""``modalities components``: what a document may build."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True)
@click.option("--kind", help="Only this kind, for example optimizer.")
@click.pass_context
def components(ctx: click.Context, kind: str | None) -> None:
    """List the components a document may build, ours and those of plugins.

    \b
    Example:
        modalities components --kind schedule
        modalities components show optimizer.adamw
    """
    if ctx.invoked_subcommand is not None:
        return
    from modalities_core.errors import ConfigError
    from modalities_core.registry import registry
    from modalities_core.spelling import did_you_mean

    known = registry()
    entries = [entry for entry in known if kind in (None, entry.kind)]
    if not entries:
        raise ConfigError(f"there is no kind `{kind}`{did_you_mean(str(kind), {entry.kind for entry in known})}")
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        click.echo(f"{entry.name:<{width}}  {entry.distribution}")
    for distribution, why in known.broken.items():
        click.echo(f"warning: the components of {distribution} could not be read: {why}", err=True)


@components.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the arguments of component NAME with types, defaults and help.

    \b
    Example:
        modalities components show optimizer.adamw
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from modalities_core.config.arguments import signature, type_name
    from modalities_core.registry import registry

    entry = registry().entry(name)
    found = signature(entry.load())
    console = Console(highlight=False, soft_wrap=False)
    console.print(f"[bold]{entry.name}[/] builds {type_name(found.returns)} ({entry.distribution})", markup=True)
    console.print(found.help, markup=False)
    if not found.arguments:
        console.print("It takes no arguments.")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("argument", "type", "default", "help"):
        table.add_column(column, overflow="fold")
    for argument in found.arguments.values():
        default = "required" if argument.required else repr(argument.default)
        table.add_row(argument.name, type_name(argument.annotation), default, argument.help)
    console.print(table, markup=False)
