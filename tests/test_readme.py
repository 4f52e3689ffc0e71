"""README's Python blocks run as they stand, and it names what the package has."""

import re
import runpy
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_there_are_blocks():
    assert len(BLOCKS) == README.count("```python") >= 3


@pytest.mark.smoke
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path):
    # From a file, because Triton reads the source of a kernel. A block's tests are called like any other.
    path = tmp_path / f"block_{number}.py"
    path.write_text(BLOCKS[number], encoding="utf-8")
    namespace = runpy.run_path(str(path))
    for name, value in namespace.items():
        if name.startswith("test_"):
            value()


def test_the_tree_and_the_notes_are_there():
    root = Path(__file__).parent.parent
    paths = set(re.findall(r"`((?:triton_moe|tests|reference)/[\w/]+\.py)`", README))
    assert paths
    for path in paths:
        assert (root / path).is_file(), path
    for note, path in re.findall(r"(NOTE \[[^]]+\]) in\s+`([^`]+)`", README):
        assert note in (root / path).read_text(encoding="utf-8"), f"{note} is not in {path}"
    tree = README.split("## The tree")[1].split("\n\n")[1]
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert (root / "triton_moe" / name).is_file(), name
