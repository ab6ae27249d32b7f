"""Around the process: streams, signals, ways to call a script, exit statuses (items 44, 45, 48, 60 to 63)."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from commands import run

import checkpoints
import cli
import data
import robustness
import softmax_training
import utils
from utils import UsageError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.name for path in ROOT.glob("*.py") if path.read_text().splitlines()[-1].startswith("    cli.")
)


def shell(command, cwd, **environment):
    """Run a command line with `$SCRIPT` for a training of a second."""
    options = "--dataset synthetic --limit 6 --depth 8 --epochs 1 --batch-size 6 --device cpu"
    script = f'"{sys.executable}" "{ROOT}/softmax_training.py" {options}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", "-o", "pipefail", "-c", command.replace("$SCRIPT", script)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=240)


def test_items_44_and_48_a_plain_locale_closed_streams_and_strange_places(tmp_path):
    """Another working directory, spaces, letters beyond ASCII, LC_ALL=C, and no stdout and stderr at all."""
    place = tmp_path / "où är ő\udcff"
    place.mkdir()
    done = shell('$SCRIPT --save-to "$PWD/ein Modell ß.pth.tar" >&- 2>&-', place, LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0
    assert checkpoints.load(place / "ein Modell ß.pth.tar")["finished"]
    assert (place / "ein Modell ß.log").exists() and (place / "ein Modell ß.csv").exists()


def test_item_44_a_reader_who_has_seen_enough_stops_nothing(tmp_path):
    done = shell("$SCRIPT --save-to run.pth.tar | head -n 1", tmp_path)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.count(b"\n") == 1
    assert checkpoints.load(tmp_path / "run.pth.tar")["finished"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_item_44_streams_onto_a_full_disk_stop_nothing(tmp_path):
    given = soak.tiny(tmp_path / "run.pth.tar", limit=12)
    assert soak.finish(soak.start("softmax_training", given, tmp_path, "/dev/full")) == 0
    assert checkpoints.load(tmp_path / "run.pth.tar")["finished"]


def test_item_45_a_torch_below_the_floor_of_requirements_txt_is_one_line(monkeypatch):
    for version in ("2.9.1+cu126", "1.13.0", "2.9"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(UsageError, match=r"too old: pip install 'torch>=2\.10'"):
            cli.check_versions()
    for version in ("2.10.0", "2.11.0a0+git1234", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        cli.check_versions()
    assert "torch>=2.10\n" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("closed", [False, True])
def test_item_61_streams_without_reconfigure_as_in_a_notebook(closed, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
        if closed:
            getattr(sys, name).close()
    given = soak.tiny(tmp_path / "run.pth.tar", limit=6, epochs=1)
    monkeypatch.setattr(sys, "argv", ["softmax_training.py", *given])
    with pytest.raises(SystemExit) as ended:
        cli.run(softmax_training.main, softmax_training.Config)
    assert ended.value.code == 0 and checkpoints.load(tmp_path / "run.pth.tar")["finished"]


PROGRAM = """
import sys, os, builtins, signal
real = builtins.__import__
def importing(name, *rest, **more):
    if name == "torch":
        builtins.__import__ = real
        os.kill(os.getpid(), int(sys.argv[2]))
    return real(name, *rest, **more)
builtins.__import__ = importing
sys.argv[:] = [sys.argv[1], "--help"]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_item_60_a_signal_while_torch_is_imported(script, signum):
    assert "softmax_training.py" in SCRIPTS and "checkpoints.py" in SCRIPTS
    done = python("-c", PROGRAM.replace("sys.argv[2]", str(signum.value)), ROOT / script)
    assert done.returncode == 128 + signum and done.stderr == f"{script}: interrupted\n" and not done.stdout


def python(*words, cwd=ROOT, **more):
    environment = {**os.environ, **more.pop("env", {})}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, **more
    )


def test_item_62_ways_to_call_a_script(tmp_path):
    given = soak.tiny(tmp_path / "run.pth.tar", limit=6, epochs=1)
    script, link = ROOT / "softmax_training.py", tmp_path / "stage 1.py"
    link.symlink_to(script)
    done = python(link, *given, cwd=tmp_path, env={"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    assert checkpoints.load(tmp_path / "run.pth.tar")["script"] == "softmax_training"
    done = python("-m", "cProfile", "-o", tmp_path / "profile", script, *given, "--epochs", "0")
    assert done.stderr == "softmax_training.py: --epochs 0: epochs is a whole number from 1 up\n"
    done = python("-", *given, "--overwrite", input=script.read_text())
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "run it as python SCRIPT" in done.stderr


def test_item_63_a_default_that_no_dataclass_takes_is_one_line(tmp_path):
    (tmp_path / "edited.py").write_text(
        (ROOT / "softmax_training.py").read_text().replace("(81, 122, 140)", "[81, 122]")
    )
    done = python(tmp_path / "edited.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "milestones" in done.stderr


def test_a_package_that_is_missing_is_one_line(tmp_path):
    done = python("-S", ROOT / "robustness.py", cwd=tmp_path)  # without site-packages
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No module named" in done.stderr and "pip install -r requirements.txt" in done.stderr


@pytest.mark.parametrize("number", ["-1e-9", "-.5", "-1/255", "-inf", "-nan"])
def test_item_63_a_negative_number_is_a_value_and_no_option(number):
    """Typed after a blank, as an option is."""
    for name in ("--epsilon", "--epsilons"):
        code, _, said = run(robustness, name, number)
        assert code == 2 and f"{name} " in said and "lies in [0, 1]; 8/255?" in said


# ---------------------------------------------------------------- statuses


def test_item_67_control_characters_do_not_reach_the_terminal():
    assert cli.describe_error(UsageError("ü \x1b[2J\x07\n\udcff")) == (2, "ü \\x1b[2J\\x07 \\udcff")


def leave(monkeypatch, capsys, error, *flags):
    """The exit status and stderr of a script whose main raises `error`."""

    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/softmax_training.py", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.run(main, softmax_training.Config)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a\ndefect"), 1),
        (UsageError("x"), 2),
        (data.DataError("x"), 3),
        (utils.CheckpointError("x"), 4),
        (utils.DivergenceError("x"), 5),
        (utils.FileSystemError("x"), 6),
        (OSError(28, "No space left on device", "file"), 6),
        (KeyboardInterrupt(), 130),
        (utils.Interrupted(2, "x"), 130),
        (utils.Interrupted(15, "x"), 143),
        (MemoryError(), 2),
    ],
)
def test_every_kind_of_error_has_its_status_and_one_line(monkeypatch, capsys, error, status):
    code, said = leave(monkeypatch, capsys, error)
    assert code == status and said.count("\n") == 1 and said.startswith("softmax_training.py: ")
    code, said = leave(monkeypatch, capsys, error, "--debug")
    assert code == status and (status == 130 or "Traceback" in said)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_item_60_a_signal_outside_the_loops_ends_with_its_status(monkeypatch, capsys, signum):
    monkeypatch.setattr(softmax_training, "main", lambda config: os.kill(os.getpid(), signum))
    before = signal.getsignal(signum)
    assert run(softmax_training)[0] == 128 + signum and signal.getsignal(signum) is before


def test_a_stop_on_purpose_says_that_work_is_left(monkeypatch, capsys):
    status, said = leave(monkeypatch, capsys, utils.Interrupted(None, "stopped"))
    assert (status, said) == (75, "softmax_training.py: stopped\n")


def test_item_60_a_signal_behind_an_error_of_a_library_is_not_lost():
    """As in tqdm, which lets go of a lock that it has not taken yet."""
    try:
        try:
            raise KeyboardInterrupt(signal.SIGTERM)
        finally:
            _ = {}["lock"]
    except KeyError as error:
        assert cli.describe_error(error) == (143, "interrupted")
