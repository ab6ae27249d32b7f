"""The files of a run (checkpoint, log, metrics, picture), and whether it may write them."""

import contextlib
from pathlib import Path

import checkpoints
import cli
import distributed
import utils
from utils import CheckpointError, UsageError


def claim(config):
    """Check, before any work, that a run can write its files and would replace no file of another's.

    Raises FileSystemError, CheckpointError for a checkpoint to resume that cannot be read, and UsageError for
    ranks that cannot work on one run.
    """
    options = {**cli.config_dict(config), "data_dir": None, "resumes": config.resumes}
    distributed.check_same("options", options, UsageError)
    if config.batch_size < distributed.world:
        raise UsageError(
            f"--batch-size {config.batch_size}: fewer images than the {distributed.world} ranks; begin fewer"
        )
    if config.compile == "on" and distributed.world > 1:
        raise UsageError("--compile on: several ranks do not compile; leave it out")
    with utils.hold(config.save_to), utils.hold(config.log_path):
        if not config.resumes:
            return claim_files(config)
        state = checkpoints.load_newest(config.save_to, warn=lambda line: None)
        with fitting(config.save_to):
            claim_files(config, state.get("log", ()), state.get("history", ()), resumed=True)


def claim_files(config, log=(), history=(), resumed=False):
    """Do as `claim`, while the files are locked, for a run with the lines `log` and the rows `history`.

    A resumed run owns a log or metrics file that equals what the checkpoint says, as far as both go. A new
    run may replace the log of a run of the same script that was killed before its first epoch ended.
    """
    texts = {config.log_path: log_text(log), config.metrics_path: metrics_text(history)}

    def may_replace(path):
        if config.overwrite or path not in texts or not path.is_file():
            return path.is_file() and (config.overwrite or resumed)
        there, here = path.read_bytes(), texts[path].encode("utf-8", "replace")
        if resumed:
            return there.startswith(here) or here.startswith(there)
        return b"images/s" not in there and there.startswith(f"{cli.script_name(config)}: ".encode())

    path = Path(config.save_to)
    remedy = "it is not of this run: name another, or add --overwrite"
    if checkpoints.exists(path) and not resumed:
        remedy = "--resume goes on with it, --overwrite starts anew, --save-to names another"
    outputs = (path, checkpoints.previous_of(path), config.log_path, config.metrics_path)
    outputs += (config.picture_path,)
    utils.claim(outputs, may_replace, remedy)


def log_text(lines):
    return "".join(f"{line}\n" for line in lines)


def metrics_text(history):
    """Return the metrics as CSV, a row for each epoch; before the first, the beginning of every such file."""
    return utils.csv_text(history[0], history) if history else "epoch,loss,"


@contextlib.contextmanager
def fitting(path):
    """Within it an error from contents of a wrong type or shape becomes a CheckpointError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(
            f"{path}: does not fit this run ({type(error).__name__}: {reason}); use another copy, or "
            "--overwrite starts anew"
        ) from None
