"""The command line: the only room that prints and exits."""

from __future__ import annotations


def main() -> None:
    """Run ``layerprune`` on the process's arguments."""
    from layerprune.cli.command import app

    app(prog_name="layerprune")
