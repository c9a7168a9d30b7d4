"""The ``layerprune`` command: names and one-line helps of its subcommands, each imported only when it is called."""

from __future__ import annotations

import importlib

import click

from layerprune import __version__
from layerprune.cli.faults import Fault, in_one_line
from layerprune.errors import did_you_mean

COMMANDS = {  # name: (what it does, as `layerprune --help` says it; where it is), in the order of the work
    "prune": ("Plan, export and audit in one line; heals in between if asked.", "layerprune.cli.prune:prune"),
    "inspect": ("Show a model's decoder stack and what can be removed from it.", "layerprune.cli.inspect:inspect"),
    "score": ("Measure what each layer's removal costs.", "layerprune.cli.plan:score"),
    "plan": ("Choose the layers to remove; no weight is touched.", "layerprune.cli.plan:plan"),
    "export": ("Write the smaller model that a plan describes.", "layerprune.cli.export:export"),
    "heal": ("Win back what removal took from an exported model.", "layerprune.cli.heal:heal"),
    "audit": ("Compare an exported model with its base, item by item.", "layerprune.cli.audit:audit"),
    "verify": ("Check that a folder is what export and audit left.", "layerprune.cli.verify:verify"),
    "push": ("Send an audited model to the Hub.", "layerprune.cli.push:push"),
    "run": ("Score, plan, export, heal and audit as a recipe says; resumable.", "layerprune.cli.run:run"),
    "compare": ("Show how far two scores.json agree.", "layerprune.cli.compare:compare"),
    "study": ("Ask which metric knows which layers of a model matter.", "layerprune.cli.study:study"),
    "metrics": ("List the metrics that can score layers, with their options.", "layerprune.cli.metrics:metrics"),
    "healers": ("List the ways to heal a pruned model, with their options.", "layerprune.cli.healers:healers"),
}


class App(click.Group):
    """A group that imports a subcommand when it is asked for, and answers faults in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][1].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise Fault(f"no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)} Known: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with in_one_line():
            return super().parse_args(ctx, args)


@click.command("layerprune", cls=App, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, message="layerprune %(version)s")
def app() -> None:
    """Remove decoder layers from Hugging Face language models and prove what that cost.

    \b
    layerprune plan MODEL --metric ablation --tasks arc_easy,hellaswag --drop 6 -o run/
    layerprune export run/plan.json -o smaller/
    layerprune audit smaller/ --tasks arc_easy,hellaswag
    """
