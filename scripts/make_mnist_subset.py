#!/usr/bin/env python3
"""Make rnas/assets/mnist_subset.npz: 8,000 training and 2,000 test images of MNIST, as many of each digit.

    python scripts/make_mnist_subset.py FOLDER_WITH_THE_FOUR_IDX_GZ_FILES rnas/assets/mnist_subset.npz

x_train (8000, 28, 28, 1), x_test (2000, 28, 28, 1), y_train, y_test: all uint8, pixels unchanged, in MNIST's order.
Each digit's images are taken at even distances through MNIST, whose test set begins with its easier half. The same
input gives the same bytes wherever the zlib is the same. Needs NumPy only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

# MD5 of the four files as published with MNIST, images and labels of each part.
PUBLISHED = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped idx file of unsigned bytes, checked against its published MD5 and its own header."""
    if not path.is_file():
        raise SystemExit(f"no file {path}; expected {', '.join(PUBLISHED)} in that folder")
    packed = path.read_bytes()
    digest = hashlib.md5(packed).hexdigest()
    if digest != PUBLISHED[path.name]:
        raise SystemExit(f"{path} is not the published MNIST file: MD5 {digest}, expected {PUBLISHED[path.name]}")
    try:
        raw = gzip.decompress(packed)
    except (EOFError, OSError, zlib.error) as error:
        raise SystemExit(f"{path} cannot be unpacked: {error}") from error
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).tolist()
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def even_subset(labels: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of count / 10 images of each digit, at even distances through the digit's images."""
    quota = count // 10
    of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    return np.sort(np.concatenate([where[np.arange(quota) * len(where) // quota] for where in of_digit]))


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed .npz with fixed time stamps and order, replaced in one move."""
    temporary = path.with_name(path.name + ".part")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    os.replace(temporary, path)


def main() -> None:
    """Read the idx files named on the command line and write the subset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four idx .gz files")
    parser.add_argument("out", type=Path, help="the .npz to write")
    args = parser.parse_args()
    arrays = {}
    for split, part, count in (("train", "train", 8000), ("test", "t10k", 2000)):
        images = read_idx(args.source / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(args.source / f"{part}-labels-idx1-ubyte.gz")
        keep = even_subset(labels, count)
        arrays |= {f"x_{split}": images[keep, :, :, None], f"y_{split}": labels[keep]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_npz(args.out, arrays)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
