"""Images of the user's own: ROOT/{train,test}/<class>/<image files>, 32 x 32 RGB or 28 x 28 grey."""

import itertools
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils
from utils import DataError

SPLITS = ("train", "test")
KINDS = ("32x32 RGB", "28x28 L")  # as CIFAR-10's and as MNIST's
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # whatever the ending: EPS would run a program


def read(root, splits, seed=None):
    """Return the class names of the folders of images in `root`, and of each split (labels, reader).

    A reader takes indices and returns the images, uint8 N x C x H x W. DataError names the first file or
    folder that does not fit: nothing is left out without a word.
    """
    present = [name for name in SPLITS if name in splits or (root / name).is_dir()]
    found, met, kinds = {}, {}, []
    try:
        classes = {name: _class_names(root / name) for name in present}
        for has, lacks in itertools.permutations(present, 2):
            for name in sorted(set(classes[has]) - set(classes[lacks])):
                raise unusable(root / has / name, f"is a class that {lacks} lacks; add or delete it")
        for split in splits:
            found[split] = _list_images(root / split, classes[split], met, kinds)
    except OSError as cause:
        raise unusable(
            cause.filename,
            f"cannot be read ({cause.strerror}); --data-dir names the folder that holds "
            "train/<class>/<image files> and test/<class>/<image files>",
        ) from cause
    return tuple(classes[splits[0]]), found


def _class_names(folder):
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if len(names) < 2:
        raise unusable(folder, f"holds {len(names)} class folders; a network tells two classes or more apart")
    return names


def _list_images(folder, classes, met, kinds):
    """Return the labels of the images below `folder`, by class, folder and name, and their reader.

    kinds: the kind of the first image that was ever read, which all must have; it is added to.
    """
    images, left_out = [], Counter()
    for name, place, file in _files_below(folder, met):
        ending = os.path.splitext(file)[1].lower()
        if ending not in ENDINGS:
            left_out[ending or "without an ending"] += 1
        elif name is None:
            raise unusable(os.path.join(place, file), "lies in no class folder; move it into one")
        else:
            images.append((name, place, file))
    images.sort()
    labels = np.array([classes.index(name) for name, _, _ in images])
    for label in sorted(set(range(len(classes))) - set(labels)):
        raise unusable(folder / classes[label], f"holds no image ({' '.join(ENDINGS)}); add or delete it")
    if left_out:
        listed = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common())
        utils.say(utils.printable(f"{folder}: {left_out.total()} files are left out as no images: {listed}"))
    paths = [os.path.join(place, file) for _, place, file in images]
    return labels, lambda indices: _read_images([paths[i] for i in indices], kinds)


def _files_below(folder, met):
    """Yield (class name, folder, name) of all files below `folder`; the name is None outside class folders.

    met: by its real path, each path that was met; it is added to. DataError names what is met again by a
    link, and what is no file. The tree is walked without recursion, however deep it is.
    """
    places = [(None, str(folder), os.path.realpath(folder))]
    met[places[0][2]] = folder
    for name, place, real_place in places:  # and the folders that are found on the way
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            real = os.path.join(real_place, entry.name)
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if Path(real_place).is_relative_to(real):
                    raise unusable(entry.path, "is a link in a loop: it leads back to where it is; delete it")
            if real in met:
                other = utils.printable(met[real])
                raise unusable(entry.path, f"is {other} once more; delete one: no image counts twice")
            met[real] = entry.path
            if entry.is_dir() and entry.name.startswith("."):
                raise unusable(entry.path, "is a hidden folder; delete it, or move it away from the images")
            if entry.is_dir():
                places.append((name or entry.name, entry.path, real))
            elif entry.is_file():
                yield name, place, entry.name
            else:
                raise unusable(entry.path, "is a pipe, a socket, a device or a broken link; delete it")


def _read_images(paths, kinds):
    """Return the images of `paths`, uint8 N x C x H x W; a DataError names the first that does not fit."""
    images = []
    for path in utils.progress(paths, len(paths), "reading images"):
        try:
            # No warning matters: damaged EXIF data leave the pixels alone, and huge pictures are refused.
            with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
                found = _describe_picture(image)
                kinds += [found] if found in KINDS and not kinds else []
                pixels = np.asarray(image) if found in kinds else None
        except Exception as cause:  # the image library raises nearly anything on a broken file
            reason = utils.printable(repr(cause))
            raise unusable(path, f"is no readable image ({reason}); replace it") from cause
        if pixels is None:
            raise unusable(path, f"is {found}, not {' or '.join(kinds or KINDS)}; convert it")
        images.append(np.atleast_3d(pixels).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images))


def _describe_picture(image):
    """Return size and mode of an open picture, and what of it would be lost in 3 x 8 bits a pixel."""
    lost = []
    for codec, _, _, args in image.tile:
        if ";1" in str(args) or (codec.startswith("ppm") and args[-1] != 255):  # such as RGB;16B
            lost.append("of other than 8 bits")
    if getattr(image, "n_frames", 1) > 1:
        lost.append(f"of {image.n_frames} pictures")
    if "transparency" in image.info:
        lost.append("with transparency")
    return " ".join([f"{image.width}x{image.height} {image.mode}", *lost])


def unusable(path, words):
    return DataError(f"{utils.printable(path)} {words}")
