"""`robustness.py` as a whole: its table, its files, its options, and that nothing of it is left to chance."""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
import evaluation
import robustness
import utils
from evaluation import pictures, report, trials
from prototype_conformity import PrototypeConformityLoss
from resnet_model import resnet

LIMIT, SIZE = 12, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four classes of small images told apart by colour, and two checkpoints: one with prototypes."""
    root = tmp_path_factory.mktemp("robustness")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate("abcd"):
        (root / "test" / name).mkdir(parents=True)
        for index in range(LIMIT // 4):
            noise = torch.randint(0, 90, (SIZE, SIZE, 3), generator=generator)
            image = 80 + noise + 40 * torch.tensor([label & 1, label >> 1, 1])
            Image.fromarray(image.byte().numpy()).save(root / "test" / name / f"{index}.png")
    split = data.load("folder", root, splits=("test",)).test
    save(root / "softmax.pth.tar", "softmax_training", 0, split)
    save(root / "pcl.pth.tar", "pcl_training", 1, split)
    return root


def save(path, script, seed, split):
    """A checkpoint as the scripts write it, of a network that a few steps have taught the four colours."""
    torch.manual_seed(seed)
    model = resnet(4, 8)
    criterion = PrototypeConformityLoss(4, {"layer3": 64, "fc": 1024}, 1.0, 1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = data.to_float(split.images)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images).logits, split.labels).backward()
        optimizer.step()
    state = {"script": script, "classes": list("abcd"), "epoch": 1, "state_dict": model.state_dict()}
    if script != "softmax_training":
        criterion.init_class_means(model.eval(), split)
        state["config"] = {"weight_prox": 1.0, "weight_conprox": 1e-4, "distance": "squared"}
        state["criterion"] = criterion.state_dict()
    checkpoints.save(state, path, keep_previous=False)


def config_of(root, results, checkpoints=("softmax", "pcl"), **changes):
    base = robustness.Config(
        dataset="folder", data_dir=str(root), checkpoints=tuple(f"{root}/{c}.pth.tar" for c in checkpoints),
        results=str(results), batch_size=7, device="cpu", num_steps=3, apgd_steps=4, num_queries=10,
        cw_steps=10, cw_lr=0.1,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def run(capsys, config):
    """The lines printed, and the JSON report."""
    robustness.main(config)
    return capsys.readouterr().out.splitlines(), json.loads(open(config.results).read())


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the table


def test_settings_are_the_released_ones_and_say_where_they_cannot_reach_epsilon():
    defaults = robustness.Config()
    assert defaults.attacks[:4] == ("fgsm", "bim", "mim", "pgd") and defaults.epsilon == 8 / 255
    settings = {t.key: t.settings for t in trials.table(defaults, 10)}
    assert settings["bim"] == "BIM: 10 steps of 0.8/255"
    assert settings["mim"] == "MIM: 10 steps of 0.8/255, decay 1"
    assert settings["pgd"] == "PGD: 10 steps of 2/255, no random start"
    for epsilon, short in ((0.3, True), (20 / 255, False)):
        config = dataclasses.replace(defaults, epsilon=epsilon)
        settings = {t.key: t.settings for t in trials.table(config, 10)}
        for key in ("pgd", "pgd-margin"):
            assert ("10 steps of 2/255 (20/255 in all, less than epsilon)" in settings[key]) == short
        assert "less than epsilon" not in settings["bim"]


def test_items_18_and_20_reports_are_probed_and_cleaned_before_the_attacks_run(root, tmp_path, capsys):
    stale = [tmp_path / f"r{suffix}.123.tmp" for suffix in (".json", ".csv", ".curves.csv")]
    for path in stale:
        path.write_text("half of a rep")
    config = config_of(root, tmp_path / "r.json", ("softmax",), attacks=(), epsilons=(0.0,))
    run(capsys, config)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["r.csv", "r.curves.csv", "r.curves.pdf", "r.curves.png", "r.json"]
    (tmp_path / "r.curves.csv").unlink()
    (tmp_path / "r.curves.csv").mkdir()
    config = dataclasses.replace(config, overwrite=True)
    with pytest.raises(utils.FileSystemError, match=r"r\.curves\.csv: is a directory"):
        robustness.main(config)
    (tmp_path / "file").write_text("in the way")
    for changes in ({"results": str(tmp_path / "file" / "r.json")}, {"save_images": str(tmp_path / "file")}):
        with pytest.raises(utils.FileSystemError, match="cannot write there"):
            robustness.main(
                dataclasses.replace(config_of(root, tmp_path / "s.json"), data_dir="nowhere", **changes)
            )


def test_table_json_and_csv_say_the_same(root, tmp_path, capsys):
    """Each number is that of the bits of its images, and Worst is what all of them have in common."""
    config = config_of(root, tmp_path / "r.json", attacks=("fgsm", "pgd", "noise", "pgd-margin", "joint"))
    lines, report = run(capsys, config)
    table = [cells(line) for line in lines if line.startswith("|") and "--" not in line]
    head = ["Training", "No attack", "FGSM", "PGD", "Noise", "PGD margin", "Joint loss", "Worst"]
    assert table[0] == head
    for row, entry in zip(table[1:], report["checkpoints"], strict=True):
        bits = [[c == "1" for c in attack["robust"]] for attack in entry["attacks"].values()]
        worst = [all(column) for column in zip(*bits, strict=True)]
        wanted = [f"{100 * sum(column) / LIMIT:.2f}" for column in (*bits, worst)]
        assert [cell for cell in row[1:] if cell != "-"] == wanted
        assert entry["worst"]["robust"] == "".join("01"[w] for w in worst)
        classes = entry["worst"]["per_class"].values()
        assert sum(classes) / 4 == pytest.approx(entry["worst"]["accuracy"])
        assert 0 <= entry["worst"]["low"] <= entry["worst"]["accuracy"] <= entry["worst"]["high"] <= 100
        assert entry["attacks"]["pgd"]["max_delta"] <= 8 / 255
    assert table[1][-2] == "-"  # stage 1 has no joint loss
    assert any("gradients: exactly zero" in line and "DLR" not in line for line in lines)
    assert sum("  logit margins: quantiles" in line for line in lines) == 2

    by_key = {(row["sha256"], row["attack"]): row for row in rows(tmp_path / "r.csv")}
    for entry in report["checkpoints"]:
        for key, attack in entry["attacks"].items():
            assert float(by_key[entry["sha256"], key]["accuracy"]) == attack["accuracy"]
    assert not (tmp_path / "r.json.partial").exists()


def test_every_attack_by_its_name(root, tmp_path, capsys):
    """All names of the command line but the reference implementation's run, on a network with prototypes."""
    names = tuple(name for name in evaluation.ATTACKS if name != "autoattack")
    config = config_of(
        root, tmp_path / "r.json", ("pcl",), attacks=names, source_checkpoint=str(root / "softmax.pth.tar"),
        random_start=True, restarts=2,
    )  # fmt: skip
    _, report = run(capsys, config)
    entry = report["checkpoints"][0]
    assert tuple(entry["attacks"]) == ("clean", *names)
    for name, attack in entry["attacks"].items():
        assert attack["images"] == LIMIT
        assert attack["max_delta"] <= (0 if name == "clean" else 1 if name == "cw" else 8 / 255)
        assert (attack["max_delta"] > 0) == (name != "clean")
        assert name == "clean" or attack["settings"]
    accuracy = {name: attack["accuracy"] for name, attack in entry["attacks"].items()}
    assert accuracy["clean"] >= 75  # or nothing below would mean anything
    assert min(accuracy.values()) < accuracy["clean"]
    assert entry["worst"]["accuracy"] <= min(v for k, v in accuracy.items() if k != "cw")


def test_no_epsilon_is_no_attack(root, tmp_path, capsys):
    names = ("fgsm", "bim", "mim", "pgd", "pgd-margin", "apgd-ce", "square", "noise")
    _, report = run(capsys, config_of(root, tmp_path / "r.json", ("pcl",), attacks=names, epsilon=0.0))
    entry = report["checkpoints"][0]
    assert len({attack["robust"] for attack in entry["attacks"].values()}) == 1
    assert entry["worst"]["robust"] == entry["attacks"]["clean"]["robust"]


@pytest.mark.parametrize(
    ("copy", "labels"), [("lr0.1", ["PCL (pcl)", "PCL (lr0.1)"]), ("pcl", ["PCL ({})", "PCL ({})"])]
)
def test_rows_of_one_name_are_told_apart(copy, labels, root, tmp_path, capsys):
    """By their files' names, and by their hashes where these are the same too."""
    state, path = checkpoints.load(root / "pcl.pth.tar"), tmp_path / f"{copy}.pth.tar"
    checkpoints.save({**state, "epoch": 2}, path, keep_previous=False)
    config = config_of(root, tmp_path / "r.json", attacks=())
    config = dataclasses.replace(config, checkpoints=(*config.checkpoints, str(path)))
    lines, report = run(capsys, config)
    hashes = [entry["sha256"][:8] for entry in report["checkpoints"]]
    said = [cells(line)[0] for line in lines if line.startswith("|")][2:]
    named = [label.format(sha) for label, sha in zip(labels, hashes[1:], strict=True)]
    assert said == ["Softmax", *named]
    assert cells(lines[1]) == ["Training", "No attack"]


# ---------------------------------------------------------------- more than the table


def test_prediction_by_prototype(root, tmp_path, capsys):
    """Every number is then about the nearest prototype, at the class means here."""
    config = config_of(root, tmp_path / "r.json", ("pcl",), attacks=("pgd",), predict="prototype")
    lines, report = run(capsys, config)
    target = evaluation.load_target(root / "pcl.pth.tar", torch.device("cpu"), "abcd")
    split = data.load("folder", root, splits=("test",)).test
    nearest = target.prototypes.nearest(target.model(data.to_float(split.images))).argmax(1)
    right = "".join("01"[int(n == y)] for n, y in zip(nearest, split.labels, strict=True))
    assert report["checkpoints"][0]["attacks"]["clean"]["robust"] == right
    assert any("nearest prototype" in line for line in lines)
    with pytest.raises(utils.CheckpointError, match="no prototypes"):
        robustness.main(config_of(root, tmp_path / "s.json", ("softmax",), predict="prototype"))


def test_curves(root, tmp_path, capsys):
    """The curves hold the table's numbers where they meet it, and the picture is drawn."""
    config = config_of(
        root, tmp_path / "r.json", ("pcl",), attacks=("pgd", "pgd-margin"), num_steps=10, step_counts=(10, 1),
        epsilons=(8 / 255, 0.0),
    )  # fmt: skip
    _, report = run(capsys, config)
    entry = report["checkpoints"][0]["attacks"]
    found = {
        (r["attack"], r["axis"], round(float(r["value"]), 6)): r for r in rows(tmp_path / "r.curves.csv")
    }
    assert len(found) == 8
    for name in ("pgd", "pgd-margin"):
        assert float(found[name, "epsilon", 0.0]["accuracy"]) == entry["clean"]["accuracy"]
        assert float(found[name, "epsilon", round(8 / 255, 6)]["accuracy"]) == entry[name]["accuracy"]
        assert float(found[name, "steps", 10.0]["accuracy"]) == entry[name]["accuracy"]
    with Image.open(tmp_path / "r.curves.png") as picture:
        assert picture.width > picture.height > 300
    picture = (tmp_path / "r.curves.pdf").read_bytes()
    assert picture.startswith(b"%PDF") and b"CreationDate" not in picture  # which would differ
    assert len(report["curves"]) == 8


def test_without_matplotlib_only_the_picture_is_missing(root, tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else there(name, *a)
    )
    config = config_of(root, tmp_path / "r.json", ("pcl",), attacks=(), epsilons=(0.0,))
    lines, _ = run(capsys, config)
    assert any("pip install matplotlib" in line for line in lines)
    assert rows(tmp_path / "r.curves.csv")
    assert not (tmp_path / "r.curves.png").exists()


def test_kept_images_are_what_was_judged(root, tmp_path, capsys):
    """The images on disk, given to the network again, give the table's predictions."""
    folder = tmp_path / "bilder für alle"
    config = config_of(
        root, tmp_path / "r.json", ("pcl",), attacks=("fgsm", "cw"), save_images=str(folder),
        epsilons=(0.0,), sanity=True, sanity_images=4,
    )  # fmt: skip
    _, report = run(capsys, config)
    target = evaluation.load_target(root / "pcl.pth.tar", torch.device("cpu"), "abcd")
    (mine,) = folder.iterdir()
    assert sorted(path.name for path in mine.iterdir()) == ["cw", "cw.png", "fgsm", "fgsm.png"]
    blocks = [torch.load(path, weights_only=True) for path in sorted((mine / "fgsm").iterdir())]
    assert [block["index"] for block in blocks] == [0, 7]
    attacked = torch.cat([block["adversarial"] for block in blocks])
    clean = torch.cat([block["images"] for block in blocks])
    split = data.load("folder", root, splits=("test",)).test
    assert torch.equal(clean, data.to_float(split.images))
    assert (attacked - clean).abs().max() <= 8 / 255
    right = (target.logits(attacked).argmax(1) == split.labels).tolist()
    assert "".join("01"[r] for r in right) == report["checkpoints"][0]["attacks"]["fgsm"]["robust"]
    picture, side = np.asarray(Image.open(mine / "fgsm.png")), SIZE * 4
    height, width = side + pictures.LINE, side + 4
    assert picture.shape == (pictures.LINE + 3 * height, pictures.CAPTION + 7 * width, 3)
    drawn_as = {"predicted_clean": clean[:7], "predicted_8bit": blocks[0]["adversarial"]}
    for row, (key, images) in enumerate(drawn_as.items()):  # what is drawn is judged
        top = pictures.LINE + row * height
        drawn = [
            picture[top : top + side : 4, left : left + side : 4].transpose(2, 0, 1) / np.float32(255)
            for left in range(pictures.CAPTION, picture.shape[1], width)
        ]
        drawn = torch.from_numpy(np.stack(drawn)).float()
        assert (drawn - images).abs().max() <= 0.501 / 255 and (drawn - clean[:7]).abs().max() <= 8.001 / 255
        assert torch.equal(target.logits(drawn).argmax(1), blocks[0][key])
    size = (mine / "fgsm" / "00000.pt").stat().st_size
    assert size < 2 * blocks[0]["images"].nbytes + 5_000  # labels of this block alone

    run(capsys, dataclasses.replace(config, batch_size=100, epsilon=4 / 255, overwrite=True))
    (path,) = (mine / "fgsm").iterdir()  # no block of the run before is left among the new ones
    block = torch.load(path, weights_only=True)
    assert len(block["labels"]) == len(split) and (block["adversarial"] - clean).abs().max() <= 4 / 255


def test_sanity_is_printed_and_kept(root, tmp_path, capsys):
    config = config_of(root, tmp_path / "r.json", ("pcl",), attacks=(), sanity=True, sanity_images=4)
    lines, report = run(capsys, config)
    (kept,) = report["sanity"].values()
    assert len(kept) == 13
    for finding in kept:
        assert any(line.startswith(f"{finding['status']:4}  {finding['name']}: ") for line in lines)
    assert list(report["checkpoints"][0]["attacks"]) == ["clean"]


def test_model_card_has_robustbench_keys(root, tmp_path, capsys):
    config = config_of(root, tmp_path / "r.json", ("pcl",), attacks=("fgsm", "pgd"), model_card=True)
    _, report = run(capsys, config)
    (path,) = tmp_path.glob("r.*.card.json")
    card = json.loads(path.read_text())
    wanted = {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
        "architecture", "eps", "clean_acc", "reported", "autoattack_acc",
    }  # fmt: skip
    assert wanted <= card.keys()
    entry = report["checkpoints"][0]["attacks"]
    assert float(card["clean_acc"]) == pytest.approx(entry["clean"]["accuracy"], abs=0.005)
    lowest = min(entry[name]["accuracy"] for name in ("clean", "fgsm", "pgd"))
    assert float(card["reported"]) == pytest.approx(lowest, abs=0.005)
    assert card["autoattack_acc"] is None and card["unreliable"] is False
    assert card["venue"] == "ICCV 2019"
    run(capsys, config_of(root, tmp_path / "s.json", ("softmax",), attacks=(), model_card=True))
    (path,) = tmp_path.glob("s.*.card.json")  # of a network without PCL, which is not the paper's
    card = json.loads(path.read_text())
    assert wanted <= card.keys() and card["name"].startswith("Softmax")
    assert card["link"] is card["authors"] is card["venue"] is None


@pytest.mark.parametrize(("name", "least"), [("pgd-dlr", 3), ("apgd-dlr", 3), ("autoattack", 4)])
def test_losses_that_sort_the_logits_need_enough_of_them(name, least):
    config = robustness.Config(attacks=("pgd", name))
    with pytest.raises(
        utils.UsageError, match=f"{name}: needs {least} classes or more, the data have {least - 1}"
    ):
        trials.table(config, least - 1)
    assert len(trials.table(config, least)) == 3


def test_the_flat_part_of_dlr_is_told_where_its_zeros_are(root, tmp_path, capsys):
    lines, _ = run(capsys, config_of(root, tmp_path / "r.json", ("pcl",), attacks=("pgd", "apgd-dlr")))
    (line,) = [line for line in lines if "gradients: exactly zero" in line]
    assert "APGD-DLR" in line and line.endswith("DLR is flat where the true class comes third")


def test_with_nothing_named_the_scripts_own_are_measured_or_else_all_that_lie_in_their_folders(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    there = ["Models_Softmax/other.pth.tar", "Models_PCL/a.pth.tar", "Models_PCL/b.pth.tar"]
    for path in (*there, "Models_PCL/a.pth.tar.previous", "Models_PCL/a.log"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    assert robustness.checkpoints_of(robustness.Config()) == there
    own = robustness.DEFAULT_CHECKPOINTS[1]
    Path(own).touch()
    assert robustness.checkpoints_of(robustness.Config()) == [own]
    assert robustness.checkpoints_of(robustness.Config(checkpoints=("c.pth.tar",))) == ["c.pth.tar"]


def test_what_was_published_stands_under_a_table_of_cifar_10_at_8_255_alone():
    split = data.Split(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    for classes, epsilon, there in (
        (data.CIFAR10_CLASSES, 8 / 255, True),
        (data.CIFAR10_CLASSES, 4 / 255, False),
        (("cat", "dog"), 8 / 255, False),
    ):
        dataset = data.Dataset("folder", classes, split, split)
        results = evaluation.Results(robustness.Config(epsilon=epsilon), dataset, [], [])
        lines = list(report.footnotes(results))
        assert any("31.10" in line and "0.28" in line for line in lines) == there


def test_results_that_another_process_is_making_are_left_to_it(root, tmp_path):
    config = config_of(root, tmp_path / "r.json", attacks=("fgsm",))
    being_written = tmp_path / "r.json.partial.1.tmp"
    being_written.touch()
    with utils.hold(config.results), pytest.raises(utils.FileSystemError, match="another process"):
        robustness.main(config)
    assert being_written.exists()
    robustness.main(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.json"]
