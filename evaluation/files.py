"""The files of an evaluation: their names, whose they are, and what was measured for them."""

import json
from pathlib import Path

import utils

from .trials import beside

FORMAT = 7  # of the file that a stopped evaluation leaves
# Settings that may differ between an evaluation and its continuation.
FREE_ON_RESUME = {
    *("data_dir", "checkpoints", "source_checkpoint", "results", "resume", "overwrite", "device"),
}


def partial(config):
    """The file that a stopped evaluation leaves."""
    return Path(f"{config.results}.partial")


def images_folder(config, path, sha256, key):
    """Where the adversarial images of a trial on the checkpoint at `path` are kept."""
    return Path(config.save_images) / f"{Path(path).name.split('.')[0]}-{sha256[:8]}" / key


def outputs(config, hashes):
    """All files that an evaluation writes for good; `hashes`: the networks' SHA-256 by path."""
    suffixes = [".json", ".csv"]
    suffixes += [".curves.csv", ".curves.png", ".curves.pdf"] if config.epsilons or config.step_counts else []
    suffixes += [".autoattack.log"] if "autoattack" in config.attacks else []
    suffixes += [f".{sha256[:8]}.card.json" for sha256 in hashes.values() if config.model_card]
    found = [beside(config, suffix) for suffix in suffixes]
    for path, sha256 in hashes.items() if config.save_images is not None else ():
        found += [images_folder(config, path, sha256, key).with_suffix(".png") for key in config.attacks]
    return list(dict.fromkeys(found))


def claim(config, hashes):
    """Prove, before any work, that all outputs can be written, and that none is a file of anybody else's.

    Raises FileSystemError for one that is there, unless it is of an evaluation that goes on (--resume) or is
    given up (--overwrite).
    """
    stopped = partial(config).exists()
    own = config.overwrite or (config.resume and (stopped or finished(config) is not None))
    if stopped and not own:
        raise utils.FileSystemError(
            f"{partial(config)}: a stopped evaluation; --resume goes on with it, --overwrite starts anew"
        )
    utils.claim(outputs(config, hashes), lambda path: own, "--overwrite replaces it, --results names another")
    if "autoattack" in config.attacks and not config.resume:
        beside(config, ".autoattack.log").unlink(missing_ok=True)  # it is appended to


def identity(settings, checkpoints, source, described):
    """What must agree for an evaluation to go on: settings, the data, and the SHA-256 of the networks."""
    free = set(FREE_ON_RESUME)
    if "autoattack" not in settings["attacks"]:  # the one attack whose seed goes by block
        free.add("batch_size")
    # An option that is off says nothing: results of before there was one go on.
    kept = {
        name: value for name, value in settings.items() if name not in free and value not in (None, False)
    }
    kept |= {"checkpoints": checkpoints, "source_checkpoint": source, "data": described}
    return {"format": FORMAT, **kept}


def finished(config):
    """The `identity` of the evaluation whose results are there already; None where there are none."""
    try:
        report = json.loads(Path(config.results).read_text(encoding="utf-8"))
        hashes = [entry["sha256"] for entry in report["checkpoints"]]
        return identity(report["settings"], hashes, report["source_sha256"], report["data"])
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        return None
