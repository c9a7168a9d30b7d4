"""The wheel in a folder of its own, without the checkout beside it: what it says, and the recipes that it brings."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from checkout import ROOT
from layerprune.cli.command import COMMANDS
from layerprune.recipes import find_recipe
from source_tree import copied, tracked, unpacked


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    home = tmp_path_factory.mktemp("wheel")
    source = unpacked(copied(tracked(), home / "source"), home)  # as `python -m build` makes it
    pip = [sys.executable, "-m", "pip"]
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", home, source], check=True, capture_output=True, cwd=home)
    (wheel,) = home.glob("layerprune-*.whl")
    subprocess.run([*pip, "install", *options, "--target", home / "site", wheel], check=True, capture_output=True)
    return home


def said(home, *words):
    command = [sys.executable, "-m", *words]
    path = {"PYTHONPATH": str(home / "site")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=os.environ | path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_wheel_that_answers_with_every_command_and_its_recipes(installed):
    script = (
        "import layerprune, pathlib\n"
        "from layerprune.cli.command import app\nfrom layerprune.recipes import find_recipe, read_recipe\n"
        "assert 'site' in layerprune.__file__, layerprune.__file__\n"
        "assert pathlib.Path(layerprune.__file__).with_name('py.typed').exists()\n"
        "found = find_recipe('quickstart')\nassert 'share' in found.parts, found\n"
        "assert read_recipe(found).plan.drop == '4'\n"
        "app(['--help'])"
    )
    (installed / "look.py").write_text(script)
    listed = " ".join(said(installed, "look").split())
    assert all(text in listed for text, _ in COMMANDS.values())


def test_it_holds_the_packages_and_the_recipes_and_nothing_else(installed):
    (wheel,) = installed.glob("layerprune-*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked() if name.startswith(("layerprune/", "optimum/"))}
    data = f"{'-'.join(wheel.name.split('-')[:2])}.data/data/share/layerprune/"
    assert found == expected | {data + name for name in tracked() if name.startswith("recipes/")}


def test_a_checkout_finds_its_own_recipes():
    assert find_recipe("quickstart") == ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe("recipes/quickstart.yaml") == Path("recipes/quickstart.yaml")
