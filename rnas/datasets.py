"""Where images come from: the shipped subset, .npz files, torchvision data sets, image folders.

Every reader returns NumPy arrays (x_train, y_train, x_test, y_test) as they lie in the source; `rnas.data` checks
them and brings them into one form. N images, H W pixels, C channels, K classes.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .config import DataConfig

SHIPPED_SUBSET = Path(__file__).parent / "assets" / "mnist_subset.npz"
TORCHVISION_CLASSES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
NAMES = ("mnist-subset", *TORCHVISION_CLASSES, "imagefolder")
WHAT_TO_TYPE = "type --data.download to fetch it, or --data.root FOLDER to say where it lies"


class Arrays(NamedTuple):
    """The four arrays of a data set; images as stored, labels one integer per image."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def read(config: DataConfig) -> Arrays:
    """Read the data set that `config.dataset` names.

    Raises FileNotFoundError for what is not there and ValueError for what is damaged or not a data set.
    """
    name = config.dataset
    if (name == "imagefolder") != (config.image_size > 0):
        raise ValueError(
            f"data.image_size is for imagefolder, which needs a number above 0, and stays 0 for every other data set; "
            f"got data.dataset {name!r} with data.image_size {config.image_size}"
        )
    if name == "imagefolder":
        return read_image_folder(config)
    if name == "mnist-subset":
        return read_npz(SHIPPED_SUBSET)
    if name in TORCHVISION_CLASSES:
        return read_torchvision(name, Path(config.root), config.download)
    if name.lower().endswith(".npz") or Path(name).is_file():
        return read_npz(Path(name))
    near = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown data set {name!r}; {hint}data.dataset is one of {', '.join(NAMES)}, or the path of an .npz file"
    )


def balanced_indices(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    """Indices, ascending, of `count` images with the classes as even as they can be; all images if count is 0.

    Each class's images are taken at even distances through the file, since files may be ordered by difficulty (the
    first half of the MNIST test set is the easier one). `what` names the setting in errors. Raises ValueError if there
    are fewer images, or more classes, than `count`.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if count == 0:
        return np.arange(len(labels))
    if count < len(classes):
        raise ValueError(f"{what} must be 0 (all) or at least the number of classes, {len(classes)}; got {count}")
    if count > len(labels):
        raise ValueError(f"{what} is {count}, but there are only {len(labels)} images; 0 takes all of them")
    quotas = np.zeros(len(classes), np.int64)
    while (left := count - quotas.sum()) > 0:
        open_classes = np.flatnonzero(quotas < sizes)
        share = max(1, left // len(open_classes))
        quotas[open_classes[:left]] += share
        quotas = np.minimum(quotas, sizes)
    picked = [
        np.flatnonzero(labels == label)[np.arange(quota) * size // quota]
        for label, size, quota in zip(classes, sizes, quotas)
    ]
    return np.sort(np.concatenate(picked))


def read_npz(path: Path) -> Arrays:
    """The arrays x_train, y_train, x_test, y_test of an .npz file; pickled objects are refused."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no data file at {path.absolute()}; data.dataset is a name ({', '.join(NAMES)}) or a path"
        )
    broken = f"{path} is not a complete .npz file of plain arrays: truncated, damaged or of another kind"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{broken} (an .npz is a zip archive, and this file does not end as one)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in Arrays._fields if key not in archive.files]
            found = ", ".join(archive.files) or "none"
            if not missing:
                return Arrays(*(np.asarray(archive[key]) for key in Arrays._fields))
    except PermissionError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{broken} ({error})") from error
    raise ValueError(
        f"{path} lacks {', '.join(missing)}; expected the arrays {', '.join(Arrays._fields)}, found: {found}"
    )


def read_torchvision(name: str, root: Path, download: bool) -> Arrays:
    """One of torchvision's own data sets, in the folder layout that torchvision gives it under `root`."""
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION_CLASSES[name])
    files = torchvision_files(name, kind, root)
    missing = [path for path, _ in files if not path.exists()]
    if missing and not download:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"data set {name}: no file {missing[0].absolute()}{more}; {WHAT_TO_TYPE}")
    splits = ({"split": "train"}, {"split": "test"}) if name == "svhn" else ({"train": True}, {"train": False})
    try:
        if missing:
            for split in splits:
                kind(root, download=True, **split)
        check_idx_files(path for path, _ in files if path.name.endswith("-ubyte"))
        train, test = (kind(root, **split) for split in splits)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"data set {name} needs {error.name}: pip install {error.name}") from error
    except (RuntimeError, OSError, EOFError) as error:
        if missing and any(not path.exists() for path in missing):
            raise FileNotFoundError(f"data set {name} could not be downloaded to {root.absolute()}: {error}") from error
        raise ValueError(
            f"data set {name} is damaged: {damaged_files(files, root)}; delete and download again"
        ) from error
    labels = "labels" if name == "svhn" else "targets"
    return Arrays(*(np.asarray(array) for split in (train, test) for array in (split.data, getattr(split, labels))))


def torchvision_files(name: str, kind: type, root: Path) -> list[tuple[Path, str | None]]:
    """The files that a torchvision data set is read from, each with its MD5 where torchvision knows one."""
    if name == "svhn":
        return [(root / kind.split_list[split][1], kind.split_list[split][2]) for split in ("train", "test")]
    if name.startswith("cifar"):
        folder = root / kind.base_folder
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return [(folder / file, md5) for file, md5 in files]
    folder = root / kind.__name__ / "raw"
    return [(folder / file.removesuffix(".gz"), None) for file, _ in kind.resources]


def damaged_files(files: list[tuple[Path, str | None]], root: Path) -> str:
    """The files whose MD5 is not the expected one, or the folder if none can be told."""
    damaged = [
        str(path)
        for path, md5 in files
        if md5 and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5
    ]
    return ", ".join(damaged) or f"its files under {root.absolute()}"


def check_idx_files(paths: Iterable[Path]) -> None:
    """Raise ValueError naming the first idx file whose length is not what its header announces."""
    for path in paths:
        with path.open("rb") as file:
            magic = file.read(4)
            dimensions = magic[3] if len(magic) == 4 else 0
            header = file.read(4 * dimensions)
        if magic[:3] != b"\0\0\x08" or dimensions not in (1, 3) or len(header) != 4 * dimensions:
            raise ValueError(
                f"{path} is not an idx file of unsigned bytes: truncated or damaged; delete and download again"
            )
        expected = 4 + len(header) + math.prod(np.frombuffer(header, ">u4").tolist())
        found = path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{path} is {'truncated' if found < expected else 'too long'}: its header announces {expected} bytes, "
                f"it has {found}; delete and download again"
            )


def read_image_folder(config: DataConfig) -> Arrays:
    """RGB images of root/train and root/test (or root/val), one folder per class, classes in alphabetical order.

    Shorter side resized to `config.image_size`, centre cropped. Only the images of the balanced subset are decoded.
    """
    root = Path(config.root)
    train = find_images(root / "train")
    test = find_images(root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val")
    strangers = sorted(set(test.classes) - set(train.classes))
    if strangers:
        raise ValueError(f"{test.root} has classes that {train.root} lacks: {', '.join(strangers)}")
    arrays = []
    for split, count, what in ((train, config.train_images, "train_images"), (test, config.test_images, "test_images")):
        labels = np.array([train.class_to_idx[split.classes[label]] for label in split.targets])
        chosen = balanced_indices(labels, count, f"data.{what}")
        images = np.empty((len(chosen), config.image_size, config.image_size, 3), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            paths = [split.samples[i][0] for i in chosen]
            for i, image in enumerate(pool.map(partial(decode, size=config.image_size), paths)):
                images[i] = image
        arrays += [images, labels[chosen]]
    return Arrays(*arrays)


def find_images(folder: Path):
    """torchvision's index of `folder`: classes, class_to_idx, samples, targets; nothing is decoded."""
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder.absolute()}; type --data.root FOLDER, one that holds train/ and test/ (or val/), "
            "each with one folder of images per class"
        )
    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder.absolute()} must hold one folder per class, each with images: {error}") from error


def decode(path: str, size: int) -> np.ndarray:
    """One image file as (size, size, 3) uint8."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, resize

    try:
        with Image.open(path) as image:
            return np.asarray(center_crop(resize(image.convert("RGB"), size), size))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a complete image: {error}") from error
