"""The ``layerprune`` command and its subcommands: options made from a Config, -v/-q, faults in one line."""

from __future__ import annotations

import functools
import logging
import os
import pkgutil
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from layerprune import __version__
from layerprune.cli.console import Console
from layerprune.config import MISSING, MOVED, Config, Option, declared
from layerprune.errors import LayerpruneError, SeveralFaults, did_you_mean, one_line
from layerprune.formatting import printable
from layerprune.option_types import OptionType, file, folder

# The ``layerprune`` command: names and one-line helps of its subcommands, each imported only when it is called.


COMMANDS = {  # name: (what it does, as `layerprune --help` says it; where it is), in the order of the work
    "prune": ("Plan, export and audit in one line; heals in between if asked.", "layerprune.cli.run:prune"),
    "inspect": ("Show a model's decoder stack and what can be removed from it.", "layerprune.cli.inspect:inspect"),
    "score": ("Measure what each layer's removal costs.", "layerprune.cli.plan:score"),
    "plan": ("Choose the layers to remove; no weight is touched.", "layerprune.cli.plan:plan"),
    "export": ("Write the smaller model that a plan describes.", "layerprune.cli.checkpoint:export"),
    "heal": ("Win back what removal took from an exported model.", "layerprune.cli.checkpoint:heal"),
    "audit": ("Compare an exported model with its base, item by item.", "layerprune.cli.checkpoint:audit"),
    "verify": ("Check that a folder is what export and audit left.", "layerprune.cli.checkpoint:verify"),
    "card": ("Renew a folder's model card, and keep what people wrote.", "layerprune.cli.checkpoint:card"),
    "push": ("Send an audited model to the Hub.", "layerprune.cli.checkpoint:push"),
    "run": ("Score, plan, export, heal and audit as a recipe says; resumable.", "layerprune.cli.run:run"),
    "compare": ("Show how far two scores.json agree.", "layerprune.cli.plan:compare"),
    "study": ("Ask which metric knows which layers of a model matter.", "layerprune.cli.run:study"),
    "metrics": ("List the metrics that can score layers, with their options.", "layerprune.cli.inspect:metrics"),
    "searches": ("List the searches that choose layers, with their options.", "layerprune.cli.inspect:searches"),
    "healers": ("List the ways to heal a pruned model, with their options.", "layerprune.cli.inspect:healers"),
}


HELP = {"help_option_names": ["-h", "--help"]}


class App(click.Group):
    """A group that imports a subcommand when it is asked for, and answers faults in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = pkgutil.resolve_name(COMMANDS[cmd_name][1])
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise CommandFault(f"no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)} Known: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with in_one_line():
            return super().parse_args(ctx, args)


@click.command("layerprune", cls=App, context_settings=HELP, no_args_is_help=True)
@click.version_option(__version__, message="layerprune %(version)s")
def app() -> None:
    """Remove decoder layers from Hugging Face language models and prove what that cost.

    \b
    layerprune plan MODEL --metric ablation --tasks arc_easy,hellaswag --drop 6 -o run/
    layerprune export run/plan.json -o smaller/
    layerprune audit smaller/ --tasks arc_easy,hellaswag
    """


# A subcommand of ``layerprune``: examples in its help, -v/-q, faults in one line.


pass_console = click.make_pass_decorator(Console)


class Verb(click.Command):
    """A click command with ``examples`` (whole command lines) and a word on how to go on after Ctrl-C.

    Its function is called with what was given alone, so that an option that was not keeps its one default, in the
    Config. It yields what to print, or prints by itself.
    """

    def __init__(self, *args: Any, examples: Iterable[str], after_interrupt: str = "nothing was written", **kw: Any):
        super().__init__(*args, **({"context_settings": HELP} | kw))
        self.examples = tuple(examples)
        self.after_interrupt = after_interrupt
        self.params += [
            click.Option(["-v", "--verbose"], count=True, help="Show what libraries log; twice: also tracebacks."),
            click.Option(["-q", "--quiet"], count=True, help="Show no progress, only results and errors."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with in_one_line():
            return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> None:
        verbosity = ctx.params.pop("verbose") - ctx.params.pop("quiet")
        ctx.obj = console = Console(verbosity)
        ctx.params = {name: value for name, value in ctx.params.items() if value is not None and value != ()}
        try:
            with quiet_libraries(verbosity < 1):
                for part in super().invoke(ctx) or ():
                    console.print(part)
        except BrokenPipeError:
            raise  # `layerprune metrics | head`: click ends quietly
        except (LayerpruneError, OSError) as error:  # an OSError is the machine's fault or the path's: no traceback
            if verbosity > 1:
                traceback.print_exc()
            said = str(error) if isinstance(error, LayerpruneError) else one_line(error)
            raise CommandFault(said if isinstance(error, SeveralFaults) else printable(said)) from error
        except KeyboardInterrupt:
            raise CommandFault(f"interrupted; {self.after_interrupt}", INTERRUPTED) from None
        except (SystemExit, GeneratorExit, click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as error:  # the last resort: tokenizers' panics are no Exception
            if verbosity > 1:
                traceback.print_exc()
            raise CommandFault(unforeseen(self.name or "", error)) from error


# The options of a command, made from the fields of its Config.


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Value(click.ParamType):
    """What a type of option reads from the command line."""

    def __init__(self, type: OptionType) -> None:
        self.type = type
        self.name = type.metavar or "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.type.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


FOLDER, FILE = Value(folder), Value(file)


def options(config: type[Config], without: Collection[str] = ()) -> Decorator:
    """Return a decorator that adds an option for each field of ``config`` that declares one."""
    made = [_made(name, one) for name, one in declared(config).items() if name not in without]
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(made), function)


def _made(name: str, one: Option) -> Decorator:
    flag = one.flag or f"--{name.replace('_', '-')}"
    told: dict[str, Any] = {"help": one.help + _default(one), "default": None, "required": one.value is MISSING}
    if one.type.optional:
        told |= {"is_flag": False, "flag_value": "true"}
    elif one.type.is_flag:
        return click.option(f"{flag}/--no-{flag[2:]}" if one.type.negative else flag, name, is_flag=True, **told)
    return click.option(flag, name, type=Value(one.type), metavar=one.type.metavar, multiple=one.many, **told)


def _default(one: Option) -> str:
    if one.default is not None:
        return f" Default: {one.default}."
    if one.type.is_flag:
        return f" Default: {'yes' if one.value else 'no'}." if one.type.negative else ""
    return "" if one.value in (None, (), MISSING) else f" Default: {one.value}."


def output(what: str, *, required: bool = True) -> Decorator:
    """Return the ``-o`` option; ``what`` says what is written there."""
    return click.option("-o", "--output", type=FOLDER, required=required, metavar="DIR", help=what)


# How a fault reaches whoever typed the command: one line on stderr, exit code 2; 130 after Ctrl-C.


FAULT, INTERRUPTED = 2, 130


def unforeseen(command: str, error: BaseException) -> str:
    """Write what is needed to mend a fault that nothing foresaw into a file, and return the line that names it."""
    said = f"{type(error).__name__}: {one_line(error)}"
    told = [f"layerprune {__version__}, Python {sys.version}, {sys.platform}", shlex.join(sys.argv)]
    text = "\n".join([*told, "", *traceback.format_exception(error)])
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="layerprune-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(printable(text, lines=True))  # no token of a URL goes into a report
        how = f"report it with {file.name}"
    except OSError as fault:
        how = f"run it again with -vv and report what it says (no file could be written: {one_line(fault)})"
    return f"{command} stopped at what it does not expect: {said}; to have it mended, {how}"


class CommandFault(click.ClickException):
    """Ends the command with its message after ``layerprune:``."""

    exit_code = FAULT

    def __init__(self, message: str, exit_code: int = FAULT) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"layerprune: {printable(self.message, lines=True)}", file=file, err=file is None)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn click's three-line usage errors into one line that names the help page."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        gone = error.option_name.lstrip("-") if isinstance(error, click.NoSuchOption) else None
        if gone in MOVED:
            raise CommandFault(f"--{gone} is gone: {MOVED[gone]}") from error
        page = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        raise CommandFault(printable(" ".join(error.format_message().split())) + page) from error


# Keeps the libraries underneath from talking over our own output.


VARIABLES = {  # read by the libraries when they are imported
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",  # it logs what it also raises
    "HF_HUB_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",  # for the processes that export starts
}
LOGGERS = ("transformers", "lm_eval", "datasets", "huggingface_hub", "httpx", "accelerate", "torch")


@contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """Silence logs, warnings and progress bars of third parties while the block runs; a user's own settings win."""
    if not quiet:
        yield
        return
    added = {name: value for name, value in VARIABLES.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    os.environ.update(added)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in added:
            os.environ.pop(name, None)
