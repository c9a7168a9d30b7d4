"""Good documents changed at one place, for every command that reads them: found, refused in one line, or no change."""

import json
import random
import shutil

import pytest

import audit_tiny
import heal_tiny
import malformed
from answers import DONE, PROBLEMS, REFUSED, broken_rules
from cli_tiny import done

TASKS = ["--tasks", "toy", "--include-path", "{home}/tasks"]
RECIPE = """model: {home}/base
include_path: ["{home}/tasks"]
score: {{tasks: [toy], metric: reverse-order}}
plan: {{drop: 1}}
audit: {{limit: 8, generation: false, layerwise: false}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with base/ and what came of it: run/, smaller/ (audited), healed/ (healed, audited), recipe/."""
    folder = tmp_path_factory.mktemp("mutations")
    audit_tiny.model_and_task(folder, train=20)
    audit_tiny.eval_set(folder / "base", folder / "tasks", train=20, test=20)
    heal_tiny.prose(folder / "text.txt", documents=20)
    (folder / "recipe.yaml").write_text(RECIPE.format(home=folder))
    tasks = [word.format(home=folder) for word in TASKS]
    quick = [*tasks, "--limit", 8, "--no-generation", "--no-layerwise"]
    done("plan", folder / "base", "--metric", "cosine", *tasks, "--drop", 1, "-o", folder / "run")
    done("run", folder / "recipe.yaml", "-o", folder / "recipe")
    shutil.copytree(folder / "recipe" / "checkpoint", folder / "smaller")
    done("plan", folder / "base", *tasks, "--limit", 20, "--drop", 1, "-o", folder / "journal")
    done("heal", folder / "smaller", "-o", folder / "healed", "--method", "linear", "--corpus", folder / "text.txt",
         "--window", 32, "--include-path", folder / "tasks")  # fmt: skip
    done("audit", folder / "healed", *quick)
    return folder


def run_case(home, folder, source, name, words, change, rng, codes):
    """Copy ``source`` of home, change its file ``name``, run the command; return the change and what is wrong."""
    shutil.copytree(home / source, folder / source)
    path = folder / source / name
    before = path.read_bytes()
    called, content = change(before, rng)
    path.write_bytes(content)
    places = {"{home}": home, "{here}": folder}
    for mark, place in places.items():
        words = [word.replace(mark, str(place)) for word in words]
    return called, broken_rules(folder, words, codes(before, content))


def check(cases, home, tmp_path):
    """Run (source, name, words, change, seed, codes) of every case; tell of all that go wrong together."""
    found = []
    for number, (source, name, words, change, seed, codes) in enumerate(cases):
        folder = tmp_path / str(number)
        called, wrong = run_case(home, folder, source, name, words, change, random.Random(seed), codes)
        if wrong:
            found.append(f"{words[0]} with {source}/{name}, seed {seed}: {called}: {'; '.join(wrong)}")
        shutil.rmtree(folder)
    assert not found, "\n".join([f"{len(found)} of {len(cases)} cases", *found])


# Of these files verify vouches for every byte; of README.md only for what stands between the marks.
VOUCHED = [
    *(("healed", f"layerprune/{name}.json") for name in ("plan", "receipt", "heal", "audit")),
    *(("smaller", f"layerprune/{name}.json") for name in ("plan", "receipt", "audit")),
    *(("healed", name) for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                    "model.safetensors", "report.html")),
]  # fmt: skip


def must_be_found(before, after):
    return (DONE,) if before == after else (PROBLEMS, REFUSED)


def test_verify_finds_every_change(home, tmp_path):
    cases = [
        (source, name, ["verify", f"{{here}}/{source}"], malformed.changed, seed, must_be_found)
        for number, (source, name) in enumerate(VOUCHED)
        for seed in range(1000 * number, 1000 * number + 8)
    ]
    assert len(cases) == 104
    check(cases, home, tmp_path)


def as_written(content, rng):
    """Change one value of a document and write it as layerprune does, so that no stray byte gives it away."""
    from layerprune.artifacts.base import pretty

    data = json.loads(content)
    while True:
        called, text = malformed.changed(content, rng)
        try:
            other = json.loads(text)
            if other != data:
                return called, (pretty(other) + "\n").encode()
        except (ValueError, RecursionError, AttributeError):
            continue


def test_verify_finds_every_change_that_is_written_as_layerprune_writes(home, tmp_path):
    cases = [
        (source, name, ["verify", f"{{here}}/{source}"], as_written, seed, must_be_found)
        for number, (source, name) in enumerate(VOUCHED[:7])
        for seed in range(1000 * number + 500, 1000 * number + 510)
    ]
    check(cases, home, tmp_path)


def test_a_changed_journal_is_refused_or_goes_on(home, tmp_path):
    """Its lines are read by the same command again, which measures anew what they do not hold."""
    words = ["plan", "{home}/base", *TASKS, "--drop", "1", "--limit", "20", "--force", "-o", "{here}/journal"]
    cases = [("journal", "journal.jsonl", words, malformed.changed_line, seed, refused_or_works) for seed in range(24)]
    check(cases, home, tmp_path)


def any_answer(before, after):
    return (DONE, PROBLEMS, REFUSED)


def refused_or_works(before, after):
    return (DONE, REFUSED)


# (folder, file, command, how many changes, how the file is changed): commands that refuse or work
NO_BASE = ["--base", "{home}/no"]  # all documents are read before it is missed
READERS = [
    ("smaller", "README.md", ["verify", "{here}/smaller"], 8),
    ("smaller", "layerprune/locator.json", ["verify", "{here}/smaller"], 6),
    ("smaller", "layerprune/receipt.json", ["push", "{here}/smaller", "me/model", "--dry-run"], 8),
    ("smaller", "layerprune/audit.json", ["push", "{here}/smaller", "me/model", "--dry-run"], 8),
    ("run", "scores.json", ["compare", "{home}/run/scores.json", "{here}/run/scores.json"], 20),
    ("run", "scores.json", ["plan", "--scores", "{here}/run/scores.json", "--drop", "2", "-o", "{here}/out"], 20),
    ("run", "plan.json", ["audit", "{home}/smaller", *NO_BASE, "--compare", "x={here}/run/plan.json"], 12),
    ("run", "scores.json", ["audit", "{home}/smaller", *NO_BASE, "--scores", "{here}/run/scores.json"], 12),
    ("run", "plan.json", ["export", "{here}/run", *NO_BASE, "-o", "{here}/out"], 12),
    ("run", "locator.json", ["export", "{here}/run", *NO_BASE, "-o", "{here}/out"], 6),
    ("smaller", "layerprune/receipt.json", ["audit", "{here}/smaller", *NO_BASE], 12),
    ("smaller", "layerprune/plan.json", ["heal", "{here}/smaller", *NO_BASE, "--method", "linear",
                                         "--corpus", "builtin", "-o", "{here}/out"], 12),
    ("healed", "layerprune/heal.json", ["audit", "{here}/healed", *NO_BASE], 12),
    ("recipe", "recipe.json", ["run", "{home}/recipe.yaml", "-o", "{here}/recipe"], 10),
    ("recipe", "scores.json", ["run", "{home}/recipe.yaml", "-o", "{here}/recipe"], 10),
    ("recipe", "plan.json", ["run", "{home}/recipe.yaml", "-o", "{here}/recipe"], 10),
    ("recipe", "checkpoint/layerprune/receipt.json", ["run", "{home}/recipe.yaml", "-o", "{here}/recipe"], 10),
    ("recipe", "checkpoint/layerprune/audit.json", ["run", "{home}/recipe.yaml", "-o", "{here}/recipe"], 10),
    ("base", "config.json", ["inspect", "{here}/base"], 25),
    ("base", "model.safetensors", ["inspect", "{here}/base"], 15),
    ("base", "config.json", ["score", "{here}/base", "--metric", "magnitude", "-o", "{here}/out"], 10),
]  # fmt: skip


def test_every_command_refuses_a_changed_document_or_works(home, tmp_path):
    cases = [
        (source, name, words, malformed.changed, seed, any_answer if words[0] == "verify" else refused_or_works)
        for number, (source, name, words, count) in enumerate(READERS)
        for seed in range(1000 * number + 100, 1000 * number + 100 + count)
    ]
    check(cases, home, tmp_path)
