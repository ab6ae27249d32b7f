"""Imports run one way: the two wings never import each other, and what they stand on imports neither."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
FOUNDATIONS = ("attacks", "data", "image_folder", "proximity", "contrastive_proximity", "resnet_model")
FORBIDDEN = {"training": {"evaluation", "robustness", "plot_features"}, "evaluation": {"training"}}


def imported_by(name):
    """Which of our modules a module, or any file of a package, imports."""
    folder = ROOT / name
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split(".")[0] for name in names} & OURS
    return found - {name}


def test_the_imports_are_read():
    assert {"data", "utils", "checkpoints", "cli"} <= imported_by("training")
    assert "training" in imported_by("pcl_training")


@pytest.mark.parametrize("wing", FORBIDDEN)
def test_the_wings_import_nothing_of_each_other(wing):
    assert not imported_by(wing) & FORBIDDEN[wing]


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_the_foundations_import_at_most_utils(name):
    assert imported_by(name) <= {"utils"} | (
        {"image_folder", "torchvision_sets"} if name == "data" else set()
    )
