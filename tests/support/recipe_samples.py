"""A good recipe to make worse, and a fixture that writes one."""

import pytest

GOOD = """\
model: org/name
score:
  tasks: [arc_easy, hellaswag]
  limit: 20
plan:
  drop: 25%
  protect: [0, 1, -1]
"""


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a recipe's text and returns its path."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write
