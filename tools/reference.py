"""The command line's reference page, made from the commands' own help: ``python tools/reference.py``."""

from __future__ import annotations

from pathlib import Path

import click

from layerprune.cli.command import COMMANDS, app

PAGE = Path(__file__).parents[1] / "docs" / "CLI.md"
HEAD = """# The command line

Generated from the commands' own help by `python tools/reference.py`; a test fails when it is out of date.
"""
WIDTH = 100


def reference() -> str:
    """Return the page as Markdown."""
    sizes = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    top = click.Context(app, info_name="layerprune", **sizes, **app.context_settings)
    parts = [HEAD, _section("layerprune", app, top)]
    for name in COMMANDS:
        command = app.get_command(top, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=top, **sizes)
        parts.append(_section(f"layerprune {name}", command, inner))
    return "\n".join(parts)


def _section(title: str, command: click.Command, context: click.Context) -> str:
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    click.echo(f"written: {PAGE}")
