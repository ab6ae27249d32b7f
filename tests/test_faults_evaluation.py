"""An evaluation stopped by a real signal and resumed gives the identical result (items 23, 24 and 47)."""

import json
import os
import re
import signal
import time

import pytest

import cli
import robustness
import softmax_training
import utils
from benchmarks import soak

ATTACKS = ("fgsm", "pgd")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "softmax.pth.tar"
    options = soak.tiny(path, limit=24, epochs=1)
    softmax_training.main(cli.parse_config(softmax_training.Config, options))
    return path


def options(checkpoint, results):
    """Blocks of two images and many steps: there is time to stop it, and many places."""
    settings = {"dataset": "synthetic", "limit": 10, "batch_size": 2, "num_steps": 16, "device": "auto"}
    settings |= {"checkpoints": checkpoint, "results": results}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [*words, "--attacks", *ATTACKS]


def evaluate(*words):
    robustness.main(cli.parse_config(robustness.Config, words))


def without_times(results):
    """The report, but for what the clock and the options of resuming say."""
    report = json.loads(results.read_text())
    for name in ("resume", "results"):
        report["settings"].pop(name)

    def cleaned(part):
        if isinstance(part, dict):
            return {key: cleaned(value) for key, value in part.items() if "seconds" not in key}
        return [cleaned(value) for value in part] if isinstance(part, list) else part

    return cleaned(report)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    results = tmp_path_factory.mktemp("whole") / "results.json"
    evaluate(*options(checkpoint, results))
    return results


def signalled(words, signum, delay, folder, log):
    """Send a signal to an evaluation `delay` seconds after it chose its device; return its exit status."""
    process = soak.start("robustness", words, folder, log)
    end = time.monotonic() + 100
    while "device: " not in (log.read_text() if log.exists() else ""):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    process.join(delay)
    if process.is_alive():
        os.kill(process.pid, signum)
    return soak.finish(process)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_items_23_and_24_a_real_signal_to_a_real_evaluation(signum, checkpoint, whole, tmp_path):
    results, log = tmp_path / "results.json", tmp_path / "output.txt"
    words = options(checkpoint, results)
    for delay in (0.2, 0.1, 0.0):  # a fast machine is done before the first
        status = signalled(words, signum, delay, tmp_path, log)
        if status:
            break
        results.unlink()
        log.unlink()
    assert status in (128 + signum, -signum), log.read_text()
    assert "Traceback" not in log.read_text()
    if "incomplete" in log.read_text():  # the signal found it measuring, not reading or writing
        assert re.search("incomplete: stopped at .* of 10 images", log.read_text().splitlines()[-1])
        assert not results.exists() and (tmp_path / "results.json.partial").exists()
    evaluate(*words, "--resume")
    assert without_times(results) == without_times(whole)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("results.json*.tmp"))


def test_item_47_outcomes_of_another_setting_or_checkpoint_are_refused(checkpoint, tmp_path):
    results = tmp_path / "results.json"
    words = options(checkpoint, results)

    class Once(utils.StopSignals):
        received = signal.SIGINT

        def __init__(self):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "StopSignals", Once)
        with pytest.raises(utils.Interrupted) as caught:
            evaluate(*words)
    assert caught.value.exit_status == 130
    partial = (tmp_path / "results.json.partial").read_bytes()
    for change in (["--epsilon", "4/255"], ["--seed", "1"], ["--limit", "9"], ["--num-steps", "5"]):
        with pytest.raises(utils.CheckpointError, match=r"begun with another"):
            evaluate(*words, "--resume", *change)
    other = tmp_path / "other.pth.tar"
    training = soak.tiny(other, limit=24, epochs=1, seed=5)
    softmax_training.main(cli.parse_config(softmax_training.Config, training))
    with pytest.raises(utils.CheckpointError, match="another checkpoints"):
        evaluate(*words, "--resume", "--checkpoints", str(other))
    assert (tmp_path / "results.json.partial").read_bytes() == partial and not results.exists()
