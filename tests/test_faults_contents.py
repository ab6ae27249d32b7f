"""What is in a checkpoint, measured by `robustness.py` or refused (items 13, 50 to 52, 56, 65 to 67)."""

import contextlib
import json
import math
import os
import time
import zipfile

import pytest
import torch
from commands import evaluation_of, measured, message, refused, run, same
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import checkpoints
import robustness
import utils
from resnet_model import resnet
from utils import CheckpointError

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ", "60")),  # 10000 for the long form
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


WIDE = resnet(num_classes=10, depth=8)
CENTERS = {f"{term}.fc.centers": torch.zeros(10, 1024) for term in ("proximity", "contrastive")}
PCL = {"script": "pcl_training", "criterion": CENTERS, "config": {"weight_prox": 1.0, "weight_conprox": 1e-4}}


def weights_with(**changed):
    """Sound weights of a network of ten classes with some exchanged, `__` standing for a dot."""
    changed = {name.replace("__", "."): value for name, value in changed.items()}
    return {name: changed.get(name, value) for name, value in WIDE.state_dict().items()} | changed


def filled(value, name="fcf.weight", dtype=torch.float32):
    return {name.replace(".", "__"): torch.full_like(WIDE.state_dict()[name], value, dtype=dtype)}


NO_FLOATS = (torch.bool, torch.int64, torch.cfloat)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (filled(math.nan), "fcf.weight holds NaN, Inf"),
        (filled(math.inf), "fcf.weight holds NaN, Inf"),
        (filled(1e300, dtype=torch.float64), "fcf.weight holds NaN, Inf"),
        (filled(-1, "bn1.running_var"), "bn1.running_var holds NaN, Inf or a variance below 0"),
        (filled(-1e300, "bn1.running_var", torch.float64), "bn1.running_var holds NaN"),
        *((filled(1, dtype=kind), f"fcf.weight is {kind}") for kind in NO_FLOATS),
        (filled(1.5, "bn1.num_batches_tracked"), "num_batches_tracked is torch.float32"),
        ({"fcf__weight": torch.empty(10, 1024, device="meta")}, "no ordinary tensor"),
        ({"fcf__weight": torch.zeros(10, 1024).to_sparse()}, "no ordinary tensor"),
        ({"fcf__weight": torch.zeros(1).expand(10, 1024)}, "fcf.weight is no ordinary tensor"),
        ({"fcf__weight": torch.zeros(1).expand(10**9, 1024), "fcf__bias": torch.zeros(1).expand(10**9)},
         "fcf.weight is no ordinary tensor"),
    ],
    ids=range(13),
)  # fmt: skip
def test_items_13_50_and_52_weights_to_compute_with_or_none(tmp_path, changed, said):
    path = tmp_path / "weights.pth.tar"
    torch.save({"state_dict": weights_with(**changed)}, path)
    assert said in refused(path, 4)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_item_52_floating_point_of_any_width_is_converted(tmp_path, kind):
    path = tmp_path / "weights.pth.tar"
    torch.save({name: v.to(kind) if v.is_floating_point() else v for name, v in weights_with().items()}, path)
    assert math.isfinite(measured(path)["attacks"]["clean"]["accuracy"])
    assert {value.dtype for value in checkpoints.read_network(path).weights.values()} == {
        torch.float32, torch.int64,
    }  # fmt: skip


def test_item_50_scores_that_are_not_finite_are_no_accuracy(tmp_path):
    path = tmp_path / "huge.pth.tar"
    huge = {**filled(3e38), **filled(3e38, "fc.weight")}
    checkpoints.save({"state_dict": weights_with(**huge)}, path)
    assert "not finite" in refused(path, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(({"criterion": {"proximity.fc.centers": torch.full((10, 1024), value)}}, "holds NaN, Inf")
          for value in (math.nan, math.inf)),
        ({"criterion": {"proximity.fc.centers": torch.zeros(10, 1024, dtype=torch.int64)}}, "is torch.int64"),
        ({"criterion": {"proximity.fc.centers": [1.0]}}, "no ordinary tensor"),
        ({"criterion": {name: torch.zeros(10, 7) for name in CENTERS}}, "prototypes of fc are (10, 7)"),
        ({"criterion": {name: torch.zeros(9, 1024) for name in CENTERS}}, "prototypes of fc are (9, 1024)"),
        ({"config": {}}, "holds no prototypes"),
        *(({name: [1]}, f"its {name} is no") for name in ("script", "criterion", "config", "epoch", "data")),
        *(({name: "a"}, f"its {name} is no") for name in ("classes", "state_dict", "history")),
        ({"classes": [1, 2]}, "trained on other classes (1, 2, ...)"),
    ],
)  # fmt: skip
def test_items_51_and_65_prototypes_and_fields_of_another_kind(tmp_path, fields, said):
    path = tmp_path / "pcl.pth.tar"
    checkpoints.save({"state_dict": weights_with(), **PCL, **fields}, path)
    assert said in refused(path, 4, *evaluation_of(path), "--predict", "prototype")


def test_item_56_the_sha256_is_that_of_the_bytes_that_were_loaded(tmp_path, monkeypatch):
    """The file is replaced as soon as it has been read."""
    path, read = tmp_path / "run.pth.tar", torch.load
    checkpoints.save({"state_dict": weights_with()}, path)
    before = utils.sha256(path)

    def read_and_replaced(*args, **settings):
        state = read(*args, **settings)
        checkpoints.save({"state_dict": weights_with(**filled(0))}, path, keep_previous=False)
        return state

    monkeypatch.setattr(torch, "load", read_and_replaced)
    assert measured(path)["sha256"] == before != utils.sha256(path)


def nested(times):
    """Lists in lists, each twice: few bytes, but 2 ** times entries when printed."""
    inside = []
    for _ in range(times):
        inside = [inside, inside]
    return inside


LAYERS = {f"layer1.{index}.conv1.weight": torch.zeros(1) for index in range(300)}
ESCAPES = "\x1b[2J\x07\r\n\u202e" * 9


@pytest.mark.parametrize(
    "state",
    [
        {"format": nested(22)},
        {"format": 10**5000},
        {"state_dict": {**WIDE.state_dict(), **LAYERS}},
        {"state_dict": {**WIDE.state_dict(), "x" * 10**6: torch.zeros(1)}},
        {"state_dict": {**WIDE.state_dict(), "fc.weight": torch.zeros(1), "a" * 10**6: torch.zeros(1)}},
        {"state_dict": WIDE.state_dict(), "config": nested(22)},
        {"format": 2, "state_dict": WIDE.state_dict(), "classes": [nested(12), "x" * 10**6]},
        {"format": 2, "state_dict": WIDE.state_dict(), "classes": [ESCAPES, "b"]},
        {"state_dict": {**WIDE.state_dict(), ESCAPES: torch.zeros(1)}},
        {"state_dict": {ESCAPES: 3}},
    ],
    ids=range(10),
)
def test_items_66_and_67_hostile_contents_are_refused_at_once_in_a_short_plain_line(tmp_path, state):
    path = tmp_path / "hostile.pth.tar"
    torch.save(state, path)
    began = time.process_time()
    refused(path, 4)
    assert time.process_time() - began < 2  # with the data and the start


def test_item_67_what_is_measured_is_named_without_control_characters(tmp_path):
    path = tmp_path / "w\x1b[2J.pth.tar"
    torch.save({"state_dict": weights_with(), "epoch": ESCAPES}, path)
    code, said, _ = run(robustness, *evaluation_of(path))
    assert code == 0 and said.replace("\n", "").isprintable() and "w\\x1b[2J" in said


KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.cfloat]
EXTREME = [0.0, 1.0, -1.0, 1e-45, 1e20, 3e38, -3e38, 1e300, math.nan, math.inf]
shapes = st.none() | st.lists(st.integers(0, 3), max_size=4)
spoilt = st.tuples(
    st.sampled_from(sorted(WIDE.state_dict())), st.sampled_from(KINDS), st.sampled_from(EXTREME), shapes
)


@fuzz
@given(changes=st.lists(spoilt, max_size=4), whole=st.booleans(), extra=st.text(max_size=5))
def test_any_mapping_of_tensors_is_refused_or_measured_with_finite_numbers(tmp_path, changes, whole, extra):
    path, weights = tmp_path / "any.pth.tar", weights_with()
    for name, kind, value, shape in changes:
        kept = weights[name].shape if shape is None else shape
        weights[name] = torch.full(kept, value, dtype=torch.float64).to(kind)
    weights |= {extra: torch.zeros(2)} if extra else {}
    torch.save({"state_dict": weights} if whole else weights, path)
    code, _, said = run(robustness, *evaluation_of(path))
    assert code in (0, 4), said
    if code == 0:
        entry = json.loads((tmp_path / "results.json").read_text())["checkpoints"][0]
        assert all(0 <= attack["accuracy"] <= 100 for attack in entry["attacks"].values())
        assert "null" not in json.dumps(entry["margins"])


# ---------------------------------------------------------------- fuzz


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a few kilobytes, as bytes: every kind of content, little of each."""
    path = tmp_path_factory.mktemp("fuzz") / "small.pth.tar"
    state = {"state_dict": {"w": torch.arange(24.0).view(2, 3, 4)}, "epoch": 4, "history": [{"loss": 0.5}]}
    checkpoints.save(state, path)
    return path.read_bytes()


@fuzz
@given(data=st.data())
def test_damage_anywhere_is_refused_or_harmless(small, tmp_path, data):
    """Bytes replaced, cut off, inserted, zero or in reverse: a CheckpointError, or just what was saved."""
    path, content = tmp_path / "small.pth.tar", bytearray(small)
    path.write_bytes(small)
    whole = checkpoints.load(path)
    place = data.draw(st.integers(0, len(content) - 1))
    size = data.draw(st.sampled_from([0, 1, len(content)]) | st.integers(1, 600))
    part = content[place : place + size]
    changed = st.binary(max_size=40) | st.sampled_from([b"", bytes(len(part)), bytes(part[::-1])])
    content[place : place + size] = data.draw(changed)
    path.write_bytes(content)
    try:
        state = checkpoints.load(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert same(state, whole)


HEADS = [b"", b"PK\x03\x04", b"\x80\x02", b"<html", b"\x10\0\0\0\0\0\0\0{", b"\x80\x02\x8a\x0a"]


@fuzz
@given(head=st.sampled_from(HEADS), tail=st.binary(max_size=300))
@example(b"\xff\xff\xff\xff\xff\xff\xff\x7f{", b"")
def test_bytes_of_no_meaning_are_refused(tmp_path, head, tail):
    path = tmp_path / "noise.pth.tar"
    path.write_bytes(head + tail)
    message(path, checkpoints.read_network)


OPCODES = [bytes([c]) for c in b"}])(.012KMNXUqrhjRbcQ\x81\x85\x86\x87\x88\x89\x93\x94usaetl0"]
GLOBALS = [b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cpathlib\nPath\n"]
GLOBALS += [b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor\n"]
pickled = st.lists(
    st.one_of(
        st.sampled_from(OPCODES),
        st.sampled_from(GLOBALS),
        st.text("touch canary", max_size=12).map(lambda t: b"X" + len(t).to_bytes(4, "little") + t.encode()),
        st.integers(0, 255).map(lambda i: b"K" + bytes([i])),
    ),
    max_size=40,
).map(b"".join)


@fuzz
@given(program=pickled, wrapped=st.booleans())
@example(b"cposix\nsystem\nX\x0c\x00\x00\x00touch canary\x85R.", True)
@example(b"cposix\nsystem\nX\x0c\x00\x00\x00touch canary\x85R.", False)
def test_pickle_programs_run_nothing(tmp_path, program, wrapped):
    path, canary = tmp_path / "program.pth.tar", tmp_path / "canary"
    content = b"\x80\x02" + program + b"."
    path.write_bytes(content)
    if wrapped:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/byteorder", b"little")
    with contextlib.chdir(tmp_path), contextlib.suppress(CheckpointError):
        checkpoints.read_network(path)
    assert not canary.exists() and os.listdir(tmp_path) == [path.name]
