"""The comparison of precisions: it trains by the scripts, and what it says follows from what it measured."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import utils
from benchmarks import precision

percents = st.lists(st.floats(0, 100), min_size=1, max_size=4)


def runs_of(values):
    """Runs whose accuracies, all four of a run alike, are `values[precision]`."""
    return [
        {"precision": name, **{stage: {"clean": value, "pgd": value} for stage in precision.STAGES}}
        for name in precision.PRECISIONS
        for value in values[name]
    ]


@given(percents, percents, st.floats(0.001, 1))
def test_ranges_overlap_unless_one_lies_above_the_other(a, b, gap):
    def meet(a, b):
        (first, *others) = precision.summarise(runs_of({"float32": a, "bfloat16": b}))
        assert first["means"]["bfloat16"] == pytest.approx(sum(b) / len(b))
        assert all(row["meet"] == first["meet"] for row in others)
        return first["meet"]

    assert meet(a, b) == meet(b, a)
    assert meet(a, [a[0], *b])
    assert not meet(a, [value + max(a) + gap for value in b])


@pytest.mark.parametrize(("low", "said"), [(50.0, "overlap"), (70.0, "apart")])
def test_the_table_says_so(low, said):
    values = {"float32": [40.0, 60.0], "bfloat16": [low, 80.0]}
    lines = precision.to_markdown(precision.summarise(runs_of(values))).splitlines()
    assert len(lines) == 6 and all(said in line and "40.00 60.00" in line for line in lines[2:])


def test_both_precisions_are_trained_and_measured_and_not_twice(tmp_path, capsys):
    path = tmp_path / "precision.json"
    config = precision.Config(
        dataset="synthetic", limit=20, results=str(path), seeds=(3,), depth=8, epochs=1, milestones=(),
        pcl_epochs=1, num_steps=1, test_images=20, device="cpu",
    )  # fmt: skip
    precision.main(config)
    report = json.loads(path.read_text())
    assert [(run["precision"], run["seed"]) for run in report["runs"]] == [("float32", 3), ("bfloat16", 3)]
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    for name in precision.PRECISIONS:
        for stage, script in precision.STAGES.items():
            state = utils.load_checkpoint(tmp_path / f"precision_{name}_3" / f"{stage}.pth.tar")
            assert (state["precision"], state["script"], state["finished"]) == (name, script, True)
    precision.main(config)
    assert capsys.readouterr().out.count("finished already") == 4
    assert json.loads(path.read_text())["runs"] == report["runs"]
