"""Help pages: quick, complete, with examples that parse, and the same as the reference page."""

import ast
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from checkout import ROOT
from layerprune import option_types as types
from layerprune.cli.command import COMMANDS, Verb, app
from layerprune.config import (
    MISSING,
    AuditConfig,
    ExportConfig,
    HealConfig,
    InspectConfig,
    PlanConfig,
    PruneConfig,
    PushConfig,
    ScoreConfig,
    StudyConfig,
    VerifyConfig,
    declared,
)
from reference import reference

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "pydantic", "rich", "scipy", "yaml")


def command(name):
    found = app.get_command(click.Context(app, **app.context_settings), name)
    assert isinstance(found, Verb)
    return found


def test_help_answers_within_three_tenths_of_a_second():
    script = Path(sys.executable).parent / "layerprune"
    assert script.exists(), "the tests need layerprune installed (pip install -e .)"

    def seconds():
        start = time.perf_counter()
        subprocess.run([script, "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(7)) <= 0.3


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom layerprune.cli import main\nsys.argv = ['layerprune', '--help']\n"
        f"try:\n    main()\nexcept SystemExit:\n    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Commands:" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name):
    examples = command(name).examples
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["layerprune", name]
        with click.Context(app, info_name="layerprune", **app.context_settings) as parent:
            command(name).make_context(name, words[2:], parent=parent)  # raises where an option does not exist
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    assert all(example in shown.stdout for example in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_loudness_can_be_set(name):
    options = [param for param in command(name).params if isinstance(param, click.Option)]
    assert all(option.help for option in options)
    assert {"-v", "-q"} <= {spelling for option in options for spelling in option.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_one_line_help_of_the_list_ends_in_a_full_stop_and_fits(name):
    text = COMMANDS[name][0]
    assert text.endswith(".")
    assert len(text) <= 65


def test_the_reference_page_is_up_to_date():
    page = (ROOT / "docs" / "CLI.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python tools/reference.py"


def told_defaults(name):
    """Return the default that each option's help speaks of."""
    texts = {param.name: param.help for param in command(name).params if isinstance(param, click.Option)}
    return {key: text.partition("Default: ")[2].rstrip(".") for key, text in texts.items() if "Default: " in text}


def test_the_default_of_memory_is_told_as_it_is():
    from layerprune.formatting import parse_size
    from layerprune.scoring.memory import CPU_MOST, CPU_SHARE, CUDA_SHARE

    said = re.fullmatch(
        r".* (\d+)% of a CPU's memory \(up to (\w+)\) or (\d+)% of a card's", told_defaults("score")["memory"]
    )
    assert (int(said[1]), int(said[3])) == (round(100 * CPU_SHARE), round(100 * CUDA_SHARE))
    assert parse_size(said[2], "") == CPU_MOST


CONFIGS = {
    "inspect": InspectConfig, "score": ScoreConfig, "plan": PlanConfig, "prune": PruneConfig, "export": ExportConfig,
    "heal": HealConfig, "audit": AuditConfig, "verify": VerifyConfig, "push": PushConfig, "study": StudyConfig,
}  # fmt: skip
LOCAL = {"output", "force", "stability", "scores", "digests", "verbose", "quiet"}  # of the command alone


@pytest.mark.parametrize("name", CONFIGS)
def test_the_options_of_a_command_are_the_fields_of_its_config(name):
    own = {param.name for param in command(name).params if isinstance(param, click.Option)}
    fields = {*declared(CONFIGS[name])}
    assert fields - own <= {"front"}  # prune ends in one model
    assert own - fields <= LOCAL


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_option_is_accepted_and_not_used(config):
    """Each field is read off something called a config or a request, outside the file that declares it."""
    sources = [path.read_text() for path in (ROOT / "layerprune").rglob("*.py") if path.name != "config.py"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value).rpartition(".")[2] in ("config", "request")}
    assert {*declared(config)} <= read


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_defaults_are_of_their_type(config):
    """What a type reads of a default is the default: it could have been written by a user."""
    for name, one in declared(config).items():
        if one.value not in (None, (), MISSING):
            parts = one.value if one.many else [one.value]
            assert [one.type.read(part) for part in parts] == [*parts], name


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (types.whole(1, 10), "9" * 5000), (types.whole(1, 10), 10**5000), (types.whole(1, 10), True),
        (types.whole(1, 10), 2.5), (types.whole(1, 10), "2.5"), (types.whole(1, 10), None), (types.rows, 0),
        (types.rows, "autoo"), (types.rows, 10**400), (types.size, -1), (types.size, 10**400), (types.size, "9" * 400),
        (types.size, 1.5), (types.text(), True), (types.text(), ["a"]), (types.names, " , "), (types.names, 3.5j),
        (types.figures, {"a": True}), (types.figures, {"a": "1"}), (types.figures, "a"), (types.figures, "a=nan"),
        (types.figures, "a=1,a=2"), (types.figures, 3), (types.flag(), "maybe"), (types.flag(), 1),
        (types.choice("a", "b"), "c"), (types.choice("a", "b"), ["a"]), (types.folder, "a\0b"), (types.folder, 3),
        (types.folder, __file__), (types.file, "/"), (types.template, 3), (types.labelled_plans, "a"),
        (types.labelled_plans, 3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_type_refuses_what_it_is_not_in_a_short_line(kind, value):
    with pytest.raises(ValueError, match=r"\w") as caught:
        kind.read(value)
    assert len(str(caught.value)) < 160
    assert "\n" not in str(caught.value)


def test_the_defaults_of_goals_are_told_as_they_are():
    from layerprune.config import CERTIFY_LIMIT
    from layerprune.planner.goals import CONFIDENCE, FAR

    told = told_defaults("plan")
    assert (told["confidence"], told["certify_limit"]) == (CONFIDENCE, str(CERTIFY_LIMIT))
    assert told["up_to"].startswith(f"{FAR} for a front")


def test_the_size_of_a_shard_is_told_as_it_is():
    from layerprune.checkpoint.writer import DEFAULT_SHARD_BYTES
    from layerprune.formatting import parse_size

    assert parse_size(told_defaults("export")["max_shard_size"], "") == DEFAULT_SHARD_BYTES


def test_every_search_is_named_in_the_help_of_plan():
    from layerprune.search import SEARCHES

    text = next(param.help for param in command("plan").params if param.name == "search")
    listed = re.sub(r"\[.*?\]", "", text.partition(". ")[0]).replace(" or ", ", ").split(", ")
    assert set(listed) == set(SEARCHES.entries())


def test_version():
    from layerprune import __version__

    shown = CliRunner().invoke(app, ["--version"])
    assert shown.stdout == f"layerprune {__version__}\n"
    by_module = [sys.executable, "-m", "layerprune", "--version"]
    assert subprocess.run(by_module, capture_output=True, text=True, check=True).stdout == shown.stdout


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["plna"], "layerprune: no command 'plna'. Did you mean 'plan'?"),
        (["plan", "m", "--tsks", "a"], "Did you mean '--tasks'? (see layerprune plan --help)"),
        (["plan", "m", "--drop", "1"], "Missing option '-o' / '--output'. (see layerprune plan --help)"),
        (["plan", "m", "-o", "x"], "nothing says how far to go; give one of --drop, --target-params,"),
        (["plan", "m", "-o", "x", "--drop", "1", "--max-drop", "2%"], "--drop and --max-drop are given; give one of"),
        (["plan", "m", "-o", "x", "--drop", "1", "--confidence", "9%"], "--confidence belongs to --max-drop"),
        (["plan", "m", "-o", "x", "--max-drop", "2"], "--max-drop '2' is not a share between 0% and 100%; write 2%"),
        (["plan", "m", "-o", "x", "--max-drop", "2%", "--confidence", "4%"], "is less than a coin has; write 95%"),
        (["plan", "m", "-o", "x", "--max-drop", "2%", "--up-to", "0"], "--up-to 0: at least one layer goes"),
        (["plan", "m", "-o", "x", "--drop", "100%"], "--drop 100%: at least one layer goes and one stays"),
        (["plan", "m", "-o", "x", "--drop", "1", "--seed", "-1"], "Invalid value for '--seed'"),
        (["heal", "x", "-o", "y", "--method", "linear", "--seed", "-1"], "Invalid value for '--seed'"),
        (["plan", "m", "-o", "x", "--target-params", "many"], "is not a number of parameters; write 1.2B or 110M"),
        (["plan", "m", "-o", "x", "--target-bytes", "5 apples"], "--target-bytes '5 apples' is not a size; write"),
        (["plan", "m", "-o", "x", "--target-speedup", "0.9x"], "--target-speedup '0.9x' is not a speed-up; write 1.3x"),
        (["plan", "m", "-o", "x", "--drop", "1", "--no-adjacent", "--contiguous"], "exclude each other"),
        (["plan", "m", "--drop", "1", "-o", "x", "--limit", "0"], "Invalid value for '--limit'"),
        (["plan", "m", "--drop", "1", "-o", "x", "--batch-size", "many"], "neither auto nor a number"),
        (["plan", "m", "--drop", "1", "-o", "x", "--tasks", " , "], "no name given"),
        (["audit", "x", "--compare", "cosine"], "write cosine=cosine/plan.json"),
        (["--vrbose"], "No such option '--vrbose'"),
        (["export", "-o", "x"], "Missing argument 'PLAN|MODEL'"),
        (["inspect"], "Missing argument 'MODEL'"),
    ],
)
def test_faults_of_the_command_line_take_one_line_and_exit_code_2(words, answer):
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 2
    assert answer in shown.stderr
    assert shown.stderr.startswith("layerprune: ")
    assert shown.stderr.count("\n") == 1
    assert shown.stdout == ""
