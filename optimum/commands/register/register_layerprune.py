"""``optimum-cli layerprune ...``: the same commands as ``layerprune ...``.

optimum-cli reads every file of the namespace package ``optimum.commands.register``; no folder here may have an
``__init__.py`` (PEP 420), or it would hide optimum itself.
"""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from layerprune.cli.command import COMMANDS


class LayerpruneCommand(BaseOptimumCLICommand):
    """Hands the words after ``optimum-cli layerprune`` to layerprune's own command line."""

    COMMAND = CommandInfo(name="layerprune", help="Remove decoder layers and prove what that cost.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        commands = "\n".join(f"  {name:9} {text}" for name, (text, _) in COMMANDS.items())
        parser.description = f"The commands of layerprune; each has its own --help:\n\n{commands}"
        parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="as after `layerprune`")

    def run(self) -> None:
        from layerprune.cli.command import app

        assert self.args is not None  # optimum-cli parses before it runs
        app(args=self.args.words, prog_name="optimum-cli layerprune")


REGISTER_COMMANDS = [LayerpruneCommand]
