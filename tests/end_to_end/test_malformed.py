"""Malformed options and files, through the command line: each is answered in one line, and nothing is written."""

import json
import shutil

import pytest

import audit_tiny
import families
import heal_tiny
import malformed
import scores_samples
from answers import PROBLEMS, REFUSED, broken_rules
from layerprune import config
from layerprune.healing import HEALERS
from layerprune.scoring.metrics import METRICS
from layerprune.search import SEARCHES

MODEL = ["{home}/base", "--tasks=toy", "--include-path={home}/tasks"]
# How each command is called, without its options, and where it would write.
CALLS = {
    "prune": (config.PruneConfig, [*MODEL, "--drop=1", "-o", "{out}"]),
    "inspect": (config.InspectConfig, ["{home}/base"]),
    "score": (config.ScoreConfig, [*MODEL, "-o", "{out}"]),
    "plan": (config.PlanConfig, [*MODEL, "--drop=1", "-o", "{out}"]),
    "export": (config.ExportConfig, ["{home}/run", "-o", "{out}"]),
    "heal": (config.HealConfig, ["{home}/pruned-3", "--method=linear", "--corpus={home}/text.txt", "-o", "{out}"]),
    "audit": (config.AuditConfig, ["{home}/pruned-3", "--tasks=toy", "--include-path={home}/tasks"]),
    "verify": (config.VerifyConfig, ["{home}/pruned-3"]),
    "push": (config.PushConfig, ["{home}/pruned-3", "me/model", "--dry-run"]),
    "study": (config.StudyConfig, [*MODEL, "-o", "{out}"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with base/, tasks/, pruned-3/, run/, scores.json and text.txt."""
    folder = tmp_path_factory.mktemp("malformed")
    heal_tiny.pruned(folder, 3)
    audit_tiny.eval_set(folder / "base", folder / "tasks", train=4, test=4)
    families.make_plan(folder / "base", families.Removal.of(3)).save(folder / "run" / "plan.json")
    scores_samples.scores().save(folder / "scores.json")
    heal_tiny.prose(folder / "text.txt", documents=4)
    return folder


def written(words, home, folder):
    places = {"{home}": home, "{here}": folder, "{out}": folder / "out"}
    for mark, place in places.items():
        words = [word.replace(mark, str(place)) for word in words]
    return words


def check(cases, home, tmp_path):
    """Run every case, (name, what lays files into its folder, words, codes); tell of all that go wrong together."""
    found = []
    for number, (name, lay, words, codes) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        if lay is not None:
            lay(folder)
        wrong = broken_rules(folder, written(words, home, folder), codes)
        if wrong:
            found.append(f"{name}: {'; '.join(wrong)}")
        shutil.rmtree(folder)
    assert not found, "\n".join([f"{len(found)} of {len(cases)} cases", *found])


def options(command, pairs, call):
    """Yield a case for each (flag, value): the command called as it should be, but for that."""
    for flag, value in pairs:
        yield (
            f"{command} {flag}={value[:40]!r} ({len(value)} characters)",
            None,
            [command, *call, f"{flag}={value}"],
            (REFUSED,),
        )


def test_malformed_values_of_every_option_are_refused(home, tmp_path):
    cases = [
        case
        for command, (declared, call) in CALLS.items()
        if command != "prune"  # its options are those of plan
        for case in options(command, malformed.bad_values(declared), call)
    ]
    assert len(cases) >= 300
    check(cases, home, tmp_path)


def test_odd_values_of_every_option_end_in_one_line(home, tmp_path):
    """Values that some options take: of a model that is not there, so that each ends before anything is loaded."""
    nowhere = {
        command: (declared, [word.replace("{home}/", "{home}/no-") for word in call])
        for command, (declared, call) in CALLS.items()
    }
    cases = [
        case
        for command, (declared, call) in nowhere.items()
        for case in options(command, list(malformed.odd_values(declared))[:: 2 if command == "prune" else 7], call)
    ]
    check(cases, home, tmp_path)


def test_odd_options_of_every_plug_in_end_in_one_line(home, tmp_path):
    """Of a model that is not there, as above: what these specs say has to be refused, or is, whatever the model."""
    calls = {
        METRICS: ("--metric", ["score", "{home}/no-base", "--tasks=toy", "-o", "{out}"]),
        SEARCHES: ("--search", ["plan", "{home}/no-base", "--tasks=toy", "--drop=1", "-o", "{out}"]),
        HEALERS: ("--heal", ["prune", "{home}/no-base", "--tasks=toy", "--drop=1", "--corpus=builtin", "-o", "{out}"]),
    }
    cases = [
        (f"{spec[:60]!r} ({len(spec)} characters)", None, [*words, f"{flag}={spec}"], (REFUSED,))
        for registry, (flag, words) in calls.items()
        for spec in list(malformed.odd_specs(registry))[::3]  # 13 values an option: each has its turn
    ]
    assert len(cases) >= 300
    check(cases, home, tmp_path)


def test_numbers_without_end_are_no_options_of_a_plug_in(home, tmp_path):
    """No learning rate or weight is infinite or not a number, and no count has 400 digits."""
    endless = [f"={value}" for value in ("nan", "inf", "1e400", "9" * 400)]
    words = ["heal", "{home}/pruned-3", "--corpus={home}/text.txt", "--window=32", "-o", "{out}"]
    cases = [
        (f"{spec[:60]!r}", None, [*words, f"--method={spec}"], (REFUSED,))
        for spec in malformed.odd_specs(HEALERS)
        if spec.endswith(tuple(endless))
    ]
    check(cases, home, tmp_path)


def file_at(name, content):
    """Return what lays a file into a folder, or puts one of ``malformed.NODES`` in its place."""

    def lay(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)

    return lay


def copied(home, source, name, content):
    """Return what copies ``source`` of home into a folder and changes one file of the copy."""

    def lay(folder):
        shutil.copytree(home / source, folder / source)
        path = folder / source / name
        if path.exists():
            path.unlink()
        file_at(f"{source}/{name}", content)(folder)

    return lay


DOWN = "model.layers.0.mlp.down_proj.weight"
HEAL = ["--method=linear", "--corpus=builtin"]
EXPORT = ["export", "{here}/base", "--remove=3", "-o", "{out}"]
# (folder of home that is copied, file of it, command): a file of another kind is put there
READERS = [
    ("run", "plan.json", ["export", "{here}/run", "-o", "{out}"]),
    ("run", "scores.json", ["plan", "--scores={here}/run/scores.json", "--drop=1", "-o", "{out}"]),
    ("run", "scores.json", ["compare", "{home}/scores.json", "{here}/run/scores.json"]),
    ("run", "scores.json", ["audit", "{home}/pruned-3", "--tasks=toy", "--scores={here}/run/scores.json"]),
    ("run", "plan.json", ["audit", "{home}/pruned-3", "--tasks=toy", "--compare=x={here}/run/plan.json"]),
    ("run", "recipe.yaml", ["run", "{here}/run/recipe.yaml", "-o", "{out}"]),
    ("pruned-3", "layerprune/receipt.json", ["audit", "{here}/pruned-3", *MODEL[1:]]),
    ("pruned-3", "layerprune/plan.json", ["heal", "{here}/pruned-3", *HEAL, "-o", "{out}"]),
    ("pruned-3", "layerprune/receipt.json", ["push", "{here}/pruned-3", "me/model", "--dry-run"]),
    ("pruned-3", "layerprune/receipt.json", ["verify", "{here}/pruned-3"]),
    ("pruned-3", "layerprune/plan.json", ["verify", "{here}/pruned-3"]),
    ("pruned-3", "layerprune/heal.json", ["verify", "{here}/pruned-3"]),
    ("pruned-3", "layerprune/audit.json", ["verify", "{here}/pruned-3"]),
    ("pruned-3", "config.json", ["verify", "{here}/pruned-3"]),
    ("pruned-3", "model.safetensors", ["verify", "{here}/pruned-3"]),
    ("pruned-3", "README.md", ["verify", "{here}/pruned-3"]),
    ("base", "config.json", ["inspect", "{here}/base"]),
    ("base", "model.safetensors", ["inspect", "{here}/base"]),
    ("base", "model.safetensors", EXPORT),
]  # fmt: skip


def codes_of(words):
    return (PROBLEMS, REFUSED) if words[0] == "verify" else (REFUSED,)


def test_files_of_another_kind_are_refused(home, tmp_path):
    cases = [
        (f"{words[0]}: {name} is {called}", copied(home, source, name, content), words, codes_of(words))
        for source, name, words in READERS
        for called, content in malformed.FILES.items()
    ]
    assert len(cases) >= 300
    check(cases, home, tmp_path)


def test_what_is_no_file_is_refused(home, tmp_path):
    cases = [
        (f"{words[0]}: {name} is {called}", copied(home, source, name, node), words, codes_of(words))
        for source, name, words in READERS
        for called, node in malformed.NODES.items()
    ]
    check(cases, home, tmp_path)


def test_malformed_recipes_are_refused(home, tmp_path):
    words = ["run", "{here}/recipe.yaml", "-o", "{out}"]
    cases = [
        (called, file_at("recipe.yaml", text.encode()), words, (REFUSED,)) for called, text in malformed.YAML.items()
    ]
    check(cases, home, tmp_path)


def test_malformed_metadata_of_a_card_is_a_problem(home, tmp_path):
    good = (home / "pruned-3" / "README.md").read_text()
    cases = [
        (
            called,
            copied(
                home, "pruned-3", "README.md", good.replace("---\n", f"---\n{text}", 1).encode("utf-8", "surrogatepass")
            ),
            ["verify", "{here}/pruned-3"],
            (0, PROBLEMS, REFUSED),  # an owner's own keys are no problem
        )
        for called, text in malformed.YAML.items()
    ]
    check(cases, home, tmp_path)


def test_malformed_headers_of_weights_are_refused(home, tmp_path):
    good = (home / "base" / "model.safetensors").read_bytes()
    cases = [
        (
            called,
            copied(home, "base", "model.safetensors", malformed.with_header(good, change)),
            ["inspect", "{here}/base"],
            (REFUSED,),
        )
        for called, change in malformed.headers(DOWN)
    ]
    check(cases, home, tmp_path)


FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "model_type", "layer_types")


def test_malformed_fields_of_a_config_end_in_one_line(home, tmp_path):
    good = json.loads((home / "base" / "config.json").read_text())
    cases = [
        (
            f"{field} is {called}",
            copied(home, "base", "config.json", malformed.with_value(good, (field,), text).encode()),
            ["inspect", "{here}/base"],
            (0, REFUSED),  # 6.0 layers, or a list of no types, may do
        )
        for field in FIELDS
        for called, text in malformed.VALUES.items()
    ]
    check(cases, home, tmp_path)
