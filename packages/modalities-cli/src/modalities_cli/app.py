"""The command tree. A command's module is imported when the command is named, a plugin's not even for ``--help``."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points, version

import click

COMMAND_GROUP = "modalities.commands"
COMMANDS = {
    "quickstart": "modalities_cli.quickstart:quickstart",
    "run": "modalities_cli.run:run",
    "launch": "modalities_cli.launch:launch",
    "check": "modalities_cli.check:check",
    "plan": "modalities_cli.plan:plan",
    "profile": "modalities_cli.profile:profile",
    "generate": "modalities_cli.generate:generate",
    "chat": "modalities_cli.chat:chat",
    "eval": "modalities_cli.evaluate:evaluate",
    "export": "modalities_cli.export:export",
    "import": "modalities_cli.import_:import_",
    "doctor": "modalities_cli.doctor:doctor",
    "components": "modalities_cli.components:components",
    "schema": "modalities_cli.schema:schema",
    "data": "modalities_data.commands:data",
}


def _plugins() -> dict[str, EntryPoint]:
    points = sorted(entry_points(group=COMMAND_GROUP), key=lambda point: point.value)
    return {point.name: point for point in points if point.name not in COMMANDS}


class CommandTree(click.Group):
    """Our commands and those of installed plugins, imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Ours in the order of use, then the plugins'."""
        return [*COMMANDS, *_plugins()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if point := _plugins().get(cmd_name):
            return _load_plugin(point)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown command with the nearest known one."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            from modalities_core.spelling import did_you_mean

            raise click.UsageError(f"there is no command `{args[0]}`{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing plugins."""
        ours = [(name, self._short_help(ctx, name)) for name in COMMANDS]
        with formatter.section("Commands"):
            formatter.write_dl(ours)
        if plugins := _plugins():
            with formatter.section("From plugins"):
                rows = [
                    (name, f"from {point.dist.name if point.dist else point.value}") for name, point in plugins.items()
                ]
                formatter.write_dl(rows)

    def _short_help(self, ctx: click.Context, name: str) -> str:
        command = self.get_command(ctx, name)
        return command.get_short_help_str(80) if command else ""


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _load_plugin(point: EntryPoint) -> click.Command:
    from modalities_core.errors import ConfigError

    distribution = _distribution(point)
    try:
        command = point.load()
    except Exception as error:
        raise ConfigError(
            f"the command `{point.name}` of {distribution} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(command, click.Command):
        raise ConfigError(f"the command `{point.name}` of {distribution} is not a click command: {point.value}")
    return command


@click.group(cls=CommandTree, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("modalities-cli"), prog_name="modalities")
def app() -> None:
    """Train, evaluate and ship foundation models from one YAML document."""
