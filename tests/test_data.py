"""Loading, checks, subsets, halves, batches and augmentation of images."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import struct
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

from rnas.augment import crop_and_flip, cut_out
from rnas.config import DataConfig
from rnas.data import Augment, Split, batches, halves, load, number_of_batches
from rnas.datasets import SHIPPED_SUBSET

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
ODD_SIZES = [(1, 1), (3, 17), (31, 33), (28, 28)]


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int, classes: int = 3) -> np.ndarray:
    return np.arange(count) % classes


def arrays(shape: tuple[int, ...] = (5, 7, 3), **changes) -> dict[str, np.ndarray]:
    made = {"x_train": images(12, shape), "y_train": labels(12), "x_test": images(6, shape, 1), "y_test": labels(6)}
    return made | changes


def npz(folder: Path, content: dict[str, np.ndarray]) -> DataConfig:
    np.savez_compressed(folder / "made.npz", **content)
    return DataConfig(dataset=str(folder / "made.npz"))


def split(count: int = 23, shape: tuple[int, ...] = (3, 5, 7), classes: int = 3) -> Split:
    return Split(torch.from_numpy(images(count, shape)), torch.from_numpy(labels(count, classes)))


# The shipped subset


def test_the_shipped_subset_is_balanced_mnist():
    dataset = load(DataConfig())
    assert dataset.name == "mnist-subset" and dataset.num_classes == 10 and dataset.image_shape == (1, 28, 28)
    assert dataset.train.labels.bincount().tolist() == [800] * 10
    assert dataset.test.labels.bincount().tolist() == [200] * 10
    # The statistics of the whole of MNIST are 0.1307 and 0.3081.
    assert dataset.mean == pytest.approx((0.1307,), abs=2e-3) and dataset.std == pytest.approx((0.3081,), abs=2e-3)
    assert SHIPPED_SUBSET.stat().st_size < 2_500_000


def test_the_shipped_subset_has_its_attribution_and_checksum_beside_it():
    text = SHIPPED_SUBSET.with_suffix(".md").read_text()
    assert "LeCun" in text and "CC BY-SA 3.0" in text
    assert hashlib.sha256(SHIPPED_SUBSET.read_bytes()).hexdigest() in text


def make_subset(source: Path, out: Path) -> subprocess.CompletedProcess:
    script = REPOSITORY / "scripts" / "make_mnist_subset.py"
    command = [sys.executable, str(script), str(source), str(out)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason=f"needs the MNIST idx files in {SHARED / 'mnist'}")
def test_the_script_makes_the_shipped_subset_from_mnist(tmp_path):
    assert make_subset(SHARED / "mnist", tmp_path / "one.npz").returncode == 0
    assert make_subset(SHARED / "mnist", tmp_path / "two.npz").returncode == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as made, np.load(SHIPPED_SUBSET) as shipped:
        assert made.files == shipped.files == ["x_train", "y_train", "x_test", "y_test"]
        for key in made.files:
            np.testing.assert_array_equal(made[key], shipped[key])


def test_the_script_refuses_missing_and_foreign_files_and_writes_nothing(tmp_path):
    missing = make_subset(tmp_path, tmp_path / "out.npz")
    assert missing.returncode == 1 and "train-images-idx3-ubyte.gz" in missing.stderr
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"foreign")
    foreign = make_subset(tmp_path, tmp_path / "out.npz")
    assert foreign.returncode == 1 and "not the published MNIST file" in foreign.stderr
    assert not (tmp_path / "out.npz").exists()


# .npz files: accepted forms


@pytest.mark.parametrize(
    ("shape", "to_nchw"),
    [
        ((5, 7), lambda x: x[:, None]),
        ((5, 7, 1), lambda x: x.transpose(0, 3, 1, 2)),
        ((5, 7, 3), lambda x: x.transpose(0, 3, 1, 2)),
        ((1, 5, 7), lambda x: x),
        ((3, 5, 7), lambda x: x),
        ((3, 5, 3), lambda x: x.transpose(0, 3, 1, 2)),  # both axes could be channels: the last one is taken
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_images_of_every_layout_and_dtype(tmp_path, shape, to_nchw, dtype):
    made = arrays(shape)
    stored = dict(made)
    if dtype != np.uint8:
        stored |= {key: (made[key] / 255).astype(dtype) for key in ("x_train", "x_test")}
    dataset = load(npz(tmp_path, stored))
    assert dataset.name == "made" and dataset.num_classes == 3
    for part, key in ((dataset.train, "x_train"), (dataset.test, "x_test")):
        expected = to_nchw(stored[key])
        assert part.images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
        np.testing.assert_array_equal(part.images.numpy(), expected.astype(part.images.numpy().dtype))
        assert part.labels.dtype == torch.int64
    assert dataset.image_shape == to_nchw(made["x_train"]).shape[1:]
    pixels = to_nchw(made["x_train"]).astype(np.float64) / 255
    assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-6)
    assert dataset.std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-6)


def test_statistics_over_several_chunks_and_a_constant_channel(tmp_path):
    many = images(2500, (4, 4, 3))
    many[..., 1] = 7
    dataset = load(npz(tmp_path, arrays(x_train=many, y_train=labels(2500), x_test=many[:6])))
    assert dataset.mean == pytest.approx((many / 255).mean((0, 1, 2)), abs=1e-9)
    assert dataset.std[0] == pytest.approx((many[..., 0] / 255).std(), abs=1e-9)
    assert dataset.std[1] == pytest.approx(1 / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_dtype(tmp_path, dtype):
    dataset = load(npz(tmp_path, arrays(y_train=labels(12).astype(dtype), y_test=labels(6).astype(dtype))))
    assert dataset.train.labels.tolist() == labels(12).tolist()


def test_test_images_may_lack_a_class(tmp_path):
    assert load(npz(tmp_path, arrays(y_test=np.zeros(6, np.int64)))).num_classes == 3


# .npz files: refused forms


def with_pixel(value: float) -> np.ndarray:
    x = (images(12, (5, 7, 3)) / 255).astype(np.float32)
    x[7, 2, 3, 1] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": images(12, (5, 7, 2))}, r"x_train must be \(N, H, W\).*got \(12, 5, 7, 2\)"),
        ({"x_train": images(12, (5,))}, r"x_train must be .*got \(12, 5\)"),
        ({"x_train": images(12, (2, 5, 7, 3))}, r"x_train must be .*got \(12, 2, 5, 7, 3\)"),
        ({"x_test": images(6, (6, 7, 3))}, r"test images \(3, 6, 7\); they must agree"),
        ({"x_test": images(6, (5, 7, 1))}, r"test images \(1, 5, 7\); they must agree"),
        ({"x_train": images(11, (5, 7, 3))}, "x_train has 11 images, y_train 12 labels"),
        ({"x_test": images(7, (5, 7, 3))}, "x_test has 7 images, y_test 6 labels"),
        ({"x_train": images(12, (5, 7, 3)).astype(np.int64)}, "x_train must be uint8.*got int64"),
        ({"x_train": with_pixel(np.nan)}, "x_train has NaN or infinite"),
        ({"x_train": with_pixel(np.inf)}, "x_train has NaN or infinite"),
        ({"x_train": with_pixel(-np.inf)}, "x_train has NaN or infinite"),
        ({"x_train": with_pixel(1.001)}, r"x_train has float pixels .* to 1\.001; expected \[0, 1\]"),
        ({"x_train": with_pixel(-0.001)}, r"x_train has float pixels from -0\.001"),
        ({"x_test": (images(6, (5, 7, 3)) / 1.0)}, r"x_test has float pixels .*; expected \[0, 1\]"),
        ({"y_train": labels(12) - 1}, "y_train must be labels from 0 on; got -1"),
        ({"y_test": labels(6) - 1}, "y_test must be labels from 0 on; got -1"),
        ({"y_train": labels(12) + 1}, "y_train must use every label from 0 to its largest, 3; no image has label 0"),
        ({"y_train": labels(12) * 2}, "no image has label 1"),
        ({"y_train": np.where(labels(12) == 2, 2**62, labels(12))}, "no image has label 2"),
        ({"y_test": labels(6) + 1}, "y_test has label 3; the training labels go from 0 to 2"),
        ({"y_train": labels(12).astype(np.float32)}, r"y_train must be \(N,\) integers.*float32"),
        ({"y_test": labels(6) == 1}, r"y_test must be \(N,\) integers.*bool"),
        ({"y_train": np.eye(3, dtype=np.int64)[labels(12)]}, r"y_train must be \(N,\) integers.*\(12, 3\)"),
        ({"y_train": np.zeros(12, np.int64)}, "y_train has a single class"),
        ({"x_train": images(0, (5, 7, 3)), "y_train": labels(0)}, "y_train is empty"),
        ({"x_test": images(0, (5, 7, 3)), "y_test": labels(0)}, "y_test is empty"),
        ({"x_train": images(12, (0, 7, 3))}, "x_train is empty"),
        ({"y_train": np.array([{}] * 12, dtype=object)}, "not a complete .npz file of plain arrays"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(npz(tmp_path, arrays(**changes)))


def test_wrong_keys_say_what_is_missing_and_what_was_found(tmp_path):
    made = arrays()
    made["images"] = made.pop("x_train")
    del made["y_test"]
    with pytest.raises(ValueError, match="lacks x_train, y_test; expected .*; found: |found: y_train, x_test, images"):
        load(npz(tmp_path, made))
    with pytest.raises(ValueError, match="lacks x_train, y_train, x_test, y_test; .*found: none"):
        load(npz(tmp_path, {}))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_npz_is_refused_by_name(tmp_path, share):
    config = npz(tmp_path, arrays())
    path = Path(config.dataset)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="made.npz is not a complete .npz file"):
        load(config)


def test_a_flipped_bit_and_a_foreign_file_are_refused(tmp_path):
    config = npz(tmp_path, arrays((31, 33, 3)))
    path = Path(config.dataset)
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("x_train.npy").header_offset + archive.getinfo("x_train.npy").compress_size // 2
    damaged = bytearray(path.read_bytes())
    damaged[middle] ^= 0x10
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="made.npz is not a complete .npz file"):
        load(config)
    path.write_bytes(pickle.dumps(arrays()))
    with pytest.raises(ValueError, match="made.npz is not a complete .npz file"):
        load(config)
    with path.open("wb") as file:
        np.save(file, images(3, (5, 7)))
    with pytest.raises(ValueError, match="made.npz is not a complete .npz file"):
        load(config)
    with zipfile.ZipFile(path, "w") as archive:
        for key in arrays():
            archive.writestr(key, b"text, not an array")
    with pytest.raises(ValueError, match="y_train must be"):
        load(config)


def test_a_missing_npz_names_the_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load(DataConfig(dataset="gone.npz"))
    assert str(tmp_path / "gone.npz") in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"), [("cifar-10", "cifar10"), ("MNIST", "mnist"), ("fashon-mnist", "fashion-mnist")]
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'; did you mean '{near}'"):
        load(DataConfig(dataset=name))


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(
        ValueError, match="unknown data set 'zzzzzz'; data.dataset is one of mnist-subset, .*imagefolder"
    ):
        load(DataConfig(dataset="zzzzzz"))


@pytest.mark.parametrize("name", ["train_images", "test_images", "image_size"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"data.{name} must not be negative; got -1"):
        load(DataConfig(**{name: -1}))


def test_image_size_is_for_image_folders_only():
    with pytest.raises(ValueError, match="data.image_size is for imagefolder.*got data.dataset 'mnist-subset'.* 32"):
        load(DataConfig(image_size=32))
    with pytest.raises(ValueError, match="data.image_size is for imagefolder, which needs"):
        load(DataConfig(dataset="imagefolder"))


# Balanced subsets


@pytest.mark.parametrize("count", [10, 25, 1000, 7999, 8000])
def test_subsets_are_balanced_and_repeat(count):
    config = DataConfig(train_images=count, test_images=min(count, 2000))
    one, two = load(config), load(config)
    sizes = one.train.labels.bincount(minlength=10)
    assert len(one.train) == count and int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(one.train.images, two.train.images) and torch.equal(one.train.labels, two.train.labels)
    assert len(one.test) == min(count, 2000)


def test_a_subset_keeps_images_with_their_labels_spread_over_the_file(tmp_path):
    x = np.arange(200, dtype=np.uint8).reshape(200, 1, 1) + np.zeros((1, 4, 4), np.uint8)
    y = np.repeat([0, 1], 100)
    dataset = load(
        dataclasses.replace(npz(tmp_path, arrays(x_train=x, y_train=y, x_test=x, y_test=y)), train_images=20)
    )
    assert dataset.train.images[:, 0, 0, 0].tolist() == list(range(0, 200, 10))
    assert dataset.train.labels.tolist() == [0] * 10 + [1] * 10
    assert dataset.mean == pytest.approx((np.arange(0, 200, 10).mean() / 255,))


def test_a_subset_is_as_even_as_the_classes_allow(tmp_path):
    y = np.repeat([0, 1, 2], [2, 50, 20])
    config = npz(tmp_path, arrays(x_train=images(72, (5, 7, 3)), y_train=y))
    for count, sizes in ((3, [1, 1, 1]), (30, [2, 14, 14]), (60, [2, 38, 20]), (72, [2, 50, 20])):
        got = load(dataclasses.replace(config, train_images=count)).train.labels.bincount().tolist()
        assert got == sizes, count


@pytest.mark.parametrize("name", ["train_images", "test_images"])
def test_subsets_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=f"data.{name} must be 0 .all. or at least the number of classes, 10; got 9"):
        load(DataConfig(**{name: 9}))
    with pytest.raises(ValueError, match=f"data.{name} is 8001, but there are only [28]000 images"):
        load(DataConfig(**{name: 8001}))


# torchvision data sets, from small files in torchvision's own layout


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def fake_mnist(root: Path, folder: str) -> dict[str, np.ndarray]:
    made = arrays((28, 28))
    for key, file in (
        ("x_train", "train-images-idx3-ubyte"),
        ("y_train", "train-labels-idx1-ubyte"),
        ("x_test", "t10k-images-idx3-ubyte"),
        ("y_test", "t10k-labels-idx1-ubyte"),
    ):
        write_idx(root / folder / "raw" / file, made[key].astype(np.uint8))
    return made


def fake_cifar(root: Path, monkeypatch, kind: str, key: str) -> dict[str, np.ndarray]:
    """CIFAR batches in torchvision's layout, whose checksums torchvision is told to expect."""
    from torchvision import datasets

    cifar = getattr(datasets, kind)
    made = arrays((3, 32, 32))

    def write(name: str, content: dict) -> tuple[str, str]:
        path = root / cifar.base_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return name, hashlib.md5(path.read_bytes()).hexdigest()

    def batch(name: str, x: np.ndarray, y: np.ndarray) -> tuple[str, str]:
        return write(name, {"data": x.reshape(len(x), -1), key: y.tolist()})

    names = [name for name, _ in cifar.train_list]
    parts = np.array_split(np.arange(12), len(names))
    train = [batch(name, made["x_train"][part], made["y_train"][part]) for name, part in zip(names, parts)]
    meta = write(cifar.meta["filename"], {cifar.meta["key"]: ["a", "b", "c"]})
    monkeypatch.setattr(cifar, "train_list", train)
    monkeypatch.setattr(cifar, "test_list", [batch(cifar.test_list[0][0], made["x_test"], made["y_test"])])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": meta[1]})
    return made


def fake_svhn(root: Path, monkeypatch) -> dict[str, np.ndarray]:
    """SVHN's two files with stand-in content; scipy.io.loadmat, which torchvision reads them with, is replaced too."""
    from torchvision.datasets import SVHN

    made = arrays((3, 32, 32))
    content = {}
    splits = dict(SVHN.split_list)
    for part in ("train", "test"):
        path = root / f"{part}_32x32.mat"
        path.write_bytes(part.encode())
        splits[part] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
        y = np.where(made[f"y_{part}"] == 0, 10, made[f"y_{part}"])  # the files say 10 for the digit 0
        content[str(path)] = {"X": made[f"x_{part}"].transpose(2, 3, 1, 0), "y": y[:, None]}
    monkeypatch.setattr(SVHN, "split_list", splits)
    scipy, io = types.ModuleType("scipy"), types.ModuleType("scipy.io")
    scipy.io, io.loadmat = io, lambda path: content[str(path)]
    monkeypatch.setitem(sys.modules, "scipy", scipy)
    monkeypatch.setitem(sys.modules, "scipy.io", io)
    return made


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_torchvision_data_sets(tmp_path, monkeypatch, name):
    if name.endswith("mnist"):
        made = fake_mnist(tmp_path, {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name])
        made |= {key: made[key][:, None] for key in ("x_train", "x_test")}
    elif name == "svhn":
        made = fake_svhn(tmp_path, monkeypatch)
    else:
        kind, key = {"cifar10": ("CIFAR10", "labels"), "cifar100": ("CIFAR100", "fine_labels")}[name]
        made = fake_cifar(tmp_path, monkeypatch, kind, key)
    dataset = load(DataConfig(dataset=name, root=str(tmp_path)))
    assert dataset.name == name and dataset.num_classes == 3
    np.testing.assert_array_equal(dataset.train.images.numpy(), made["x_train"])
    np.testing.assert_array_equal(dataset.train.labels.numpy(), made["y_train"])
    np.testing.assert_array_equal(dataset.test.images.numpy(), made["x_test"])
    np.testing.assert_array_equal(dataset.test.labels.numpy(), made["y_test"])


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_a_missing_torchvision_data_set_says_where_and_what_to_type(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        load(DataConfig(dataset=name, root=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in str(error.value)
    assert "--data.download" in str(error.value) and "--data.root" in str(error.value)


def test_nothing_is_downloaded_unless_asked_and_a_failed_download_is_told(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    calls = []

    def refuse(self):
        calls.append(self.root)
        raise RuntimeError("no route to host")

    monkeypatch.setattr(MNIST, "download", refuse)
    with pytest.raises(FileNotFoundError):
        load(DataConfig(dataset="mnist", root=str(tmp_path)))
    assert not calls
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*no route to host"):
        load(DataConfig(dataset="mnist", root=str(tmp_path), download=True))
    assert len(calls) == 1


def test_a_download_is_used(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: fake_mnist(tmp_path, "MNIST") and None)
    assert len(load(DataConfig(dataset="mnist", root=str(tmp_path), download=True)).train) == 12


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("length", [0, 3, 6, -1])
def test_a_truncated_idx_file_is_named(tmp_path, file, length):
    fake_mnist(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{file} is .*truncated.*download again"):
        load(DataConfig(dataset="mnist", root=str(tmp_path)))


def test_damaged_cifar_and_svhn_files_are_named(tmp_path, monkeypatch):
    fake_cifar(tmp_path, monkeypatch, "CIFAR10", "labels")
    for file in ("data_batch_3", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / file
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        with pytest.raises(ValueError, match=f"cifar10 is damaged: .*{file}; delete"):
            load(DataConfig(dataset="cifar10", root=str(tmp_path)))
        path.write_bytes(content)
    fake_svhn(tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").write_bytes(b"t")
    with pytest.raises(ValueError, match="svhn is damaged: .*test_32x32.mat; delete"):
        load(DataConfig(dataset="svhn", root=str(tmp_path)))


def test_svhn_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    fake_svhn(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match="svhn needs scipy.*: pip install scipy"):
        load(DataConfig(dataset="svhn", root=str(tmp_path)))


# Image folders


def fake_folder(root: Path, test: str = "test") -> DataConfig:
    """Classes ant, bee, cat of 4 and 2 flat-coloured images, grey in the middle third so that crops can be told."""
    for part, count in (("train", 4), (test, 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = np.full((10, 30, 3), 50 * (number + 1) + i, np.uint8)
                picture[:, :9] = picture[:, 21:] = 255
                Image.fromarray(picture).save(root / part / name / f"{i}.png")
    return DataConfig(dataset="imagefolder", root=str(root), image_size=8)


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folders_are_resized_and_cropped_to_the_centre(tmp_path, test):
    dataset = load(fake_folder(tmp_path, test))
    assert dataset.image_shape == (3, 8, 8) and dataset.num_classes == 3
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.test.labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    assert dataset.train.images[5].unique().tolist() == [101]  # no white: the sides were cut off
    assert dataset.test.images[4].unique().tolist() == [150]


def test_a_balanced_subset_of_an_image_folder_reads_only_its_images(tmp_path):
    config = dataclasses.replace(fake_folder(tmp_path), train_images=6)
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"never read")
    dataset = load(config)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [50, 52, 100, 102, 150, 152]
    with pytest.raises(ValueError, match="data.train_images is 13, but there are only 12"):
        load(dataclasses.replace(config, train_images=13))


def test_test_labels_of_an_image_folder_go_by_class_name(tmp_path):
    config = fake_folder(tmp_path)
    for file in (tmp_path / "test" / "ant").iterdir():
        file.unlink()
    (tmp_path / "test" / "ant").rmdir()
    assert load(config).test.labels.tolist() == [1, 1, 2, 2]
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match="has classes that .* lacks: dog"):
        load(config)


def test_bad_image_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere/train; type --data.root"):
        load(DataConfig(dataset="imagefolder", root=str(tmp_path / "nowhere"), image_size=8))
    config = fake_folder(tmp_path)
    picture = tmp_path / "train" / "bee" / "2.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"train/bee/2.png is not a complete image"):
        load(config)
    for file in (tmp_path / "train" / "cat").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="must hold one folder per class.*cat"):
        load(config)


# Real CIFAR-10


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"needs CIFAR-10 in {SHARED / 'cifar10'}")
def test_real_cifar10_from_an_npz(tmp_path):
    y = np.load(SHARED / "cifar10" / "labels.npz")["y_test"]
    sheet = np.asarray(Image.open(SHARED / "cifar10" / "test.webp").convert("RGB"))
    x = sheet.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(10000, 32, 32, 3)
    x, y = x[:2000], y[:2000]
    dataset = load(
        dataclasses.replace(npz(tmp_path, {"x_train": x, "y_train": y, "x_test": x, "y_test": y}), test_images=500)
    )
    assert dataset.num_classes == 10 and dataset.image_shape == (3, 32, 32)
    assert dataset.test.labels.bincount().tolist() == [50] * 10
    # The statistics of CIFAR-10's training images are 0.491, 0.482, 0.447 and 0.247, 0.243, 0.262.
    assert dataset.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.01)
    assert dataset.std == pytest.approx((0.247, 0.243, 0.262), abs=0.01)


# Splits and halves


def test_a_split_refuses_what_is_not_one():
    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    for bad in ((x[0], y), (x.double(), y), (x, y[:3]), (x, y.int()), (x, y[:, None])):
        with pytest.raises(ValueError, match="must be"):
            Split(*bad)


@pytest.mark.parametrize("count", [2, 3, 22, 23])
def test_halves_share_nothing_and_cover_everything(count):
    whole = Split(torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1), torch.arange(count) % 3)
    first, second = halves(whole, 5)
    assert len(first) == (count + 1) // 2 and len(second) == count // 2
    numbers = torch.cat([first.images.flatten(), second.images.flatten()])
    assert numbers.sort().values.tolist() == list(range(count))
    for part in (first, second):
        assert torch.equal(part.labels, part.images.flatten().long() % 3)


def test_halves_depend_on_the_seed_alone():
    whole = split(100)
    torch.manual_seed(1)
    one = halves(whole, 5)
    torch.manual_seed(2)
    two = halves(whole, 5)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, two))
    assert not torch.equal(one[0].images, halves(whole, 6)[0].images)
    with pytest.raises(ValueError, match="cannot halve 1 images"):
        halves(split(1), 0)


# Batches


def stacked(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*batches(*args, **kwargs))
    return torch.cat(xs), torch.cat(ys)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (3, 1, 1)])
@pytest.mark.parametrize("augment", [None, Augment(crop_padding=1, flip=True, cutout=2)])
def test_batches_are_float_channels_last_in_the_unit_range(shape, augment):
    parts = list(batches(split(23, shape), 8, seed=0, epoch=0, augment=augment))
    assert [len(y) for _, y in parts] == [8, 8, 7]
    for x, y in parts:
        channels, height, width = shape
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(y), *shape)
        assert 0 <= float(x.min()) and float(x.max()) <= 1
        assert x.stride() == (channels * height * width, 1, width * channels, channels)


def test_pixels_are_divided_by_255_and_floats_left_alone():
    grey = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    whole = Split(grey, torch.zeros(256, dtype=torch.int64))
    x, _ = stacked(whole, 256, seed=0, epoch=0, shuffle=False)
    np.testing.assert_array_equal(x.flatten().numpy(), np.arange(256, dtype=np.float32) / np.float32(255))
    floats = Split(torch.rand(9, 3, 5, 7), torch.zeros(9, dtype=torch.int64))
    x, _ = stacked(floats, 4, seed=0, epoch=0, shuffle=False)
    assert torch.equal(x, floats.images)
    x.zero_()
    assert floats.images.abs().sum() > 0


def test_batches_do_not_alias_the_split():
    for whole in (split(9), Split(torch.rand(9, 3, 5, 7), torch.zeros(9, dtype=torch.int64))):
        before = whole.images.clone(), whole.labels.clone()
        for x, y in batches(whole, 4, seed=0, epoch=0, shuffle=False, augment=Augment()):
            x.fill_(7)
            y.fill_(7)
        assert torch.equal(whole.images, before[0]) and torch.equal(whole.labels, before[1])


def test_an_epoch_shows_every_image_once_with_its_label():
    count = 200
    whole = Split(torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1), torch.arange(count) % 7)
    x, y = stacked(whole, 32, seed=0, epoch=0)
    numbers = (x.flatten() * 255).round().long()
    assert numbers.sort().values.tolist() == list(range(count)) and numbers.tolist() != list(range(count))
    assert torch.equal(y, numbers % 7)
    assert not torch.equal(y, stacked(whole, 32, seed=0, epoch=1)[1])
    assert not torch.equal(y, stacked(whole, 32, seed=1, epoch=0)[1])
    x, y = stacked(whole, 32, seed=0, epoch=0, shuffle=False)
    assert torch.equal(y, whole.labels)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_interrupted_epoch_continues_exactly(shuffle, drop_last):
    settings = {
        "seed": 3,
        "epoch": 2,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "augment": Augment(crop_padding=2, flip=True, cutout=3),
    }
    whole = split(50)
    full = list(batches(whole, 8, **settings))
    assert len(full) == number_of_batches(whole, 8, drop_last) == (6 if drop_last else 7)
    for start in range(len(full) + 2):
        torch.manual_seed(start)
        torch.rand(start)
        rest = list(batches(whole, 8, start=start, **settings))
        assert len(rest) == max(0, len(full) - start)
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(full[start:], rest))
    middle = list(batches(whole, 8, start=2, stop=5, **settings))
    assert len(middle) == 3 and all(torch.equal(a, b) for (a, _), (b, _) in zip(full[2:5], middle))
    assert len(list(batches(whole, 8, stop=99, **settings))) == len(full)


def test_augmentation_differs_between_batches_and_epochs():
    whole = Split(
        torch.arange(1, 82, dtype=torch.uint8).reshape(1, 1, 9, 9).repeat(64, 1, 1, 1), torch.zeros(64).long()
    )
    augment = Augment(crop_padding=3)
    first, second = (x for x, _ in batches(whole, 32, seed=0, epoch=0, augment=augment))
    assert not torch.equal(first, second)
    assert not torch.equal(first, next(iter(batches(whole, 32, seed=0, epoch=1, augment=augment)))[0])
    assert not torch.equal(first, next(iter(batches(whole, 32, seed=1, epoch=0, augment=augment)))[0])


def test_batches_leave_the_callers_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stacked(split(), 8, seed=0, epoch=0, augment=Augment(crop_padding=1, flip=True, cutout=1))
    halves(split(), 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 24, "drop_last": True}, "23 images do not fill one batch of 24"),
        ({"batch_size": 8, "start": -1}, "start and stop must not be negative; got start -1"),
        ({"batch_size": 8, "stop": -1}, "start and stop must not be negative"),
    ],
)
def test_bad_batch_settings_are_refused_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(split(), seed=0, epoch=0, **settings)


@pytest.fixture
def one_thread():
    """Other processes may have the second core, and two threads then wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_an_epoch_of_the_subset_takes_well_under_a_third_of_a_second(one_thread):
    train = load(DataConfig()).train

    def seconds(augment: Augment | None) -> float:
        begin = time.perf_counter()
        for _ in batches(train, 64, seed=0, epoch=0, augment=augment):
            pass
        return time.perf_counter() - begin

    # The best of a few, since the machine may be busy; measured 0.01 s plain and 0.05 s augmented on one idle core.
    assert min(seconds(None) for _ in range(3)) < 0.1
    assert min(seconds(Augment(crop_padding=2, flip=True, cutout=8)) for _ in range(3)) < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu_equal_those_on_the_cpu():
    settings = {"seed": 0, "epoch": 0, "augment": Augment(crop_padding=2, flip=True, cutout=3)}
    for whole in (split(300, (3, 31, 33)), split(300, (1, 28, 28))):
        for (a, b), (c, d) in zip(batches(whole, 64, **settings), batches(whole, 64, device="cuda", **settings)):
            assert c.is_cuda and d.is_cuda and c.stride() == a.stride()
            assert torch.equal(a, c.cpu()) and torch.equal(b, d.cpu())


# Augmentation


def by_image(x, top, left, mirrored, padding):
    height, width = x.shape[2:]
    out = []
    for image, t, side, m in zip(x, top.tolist(), left.tolist(), mirrored.tolist()):
        crop = pad(image, (padding,) * 4)[:, t : t + height, side : side + width]
        out.append(crop.flip(2) if m else crop)
    return torch.stack(out)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_and_flips_equal_those_of_a_loop_over_images(size, channels, padding, dtype):
    random = torch.Generator().manual_seed(padding)
    x = torch.randint(1, 256, (17, channels, *size), generator=random).to(dtype)
    top, left = (torch.randint(2 * padding + 1, (17,), generator=random) for _ in range(2))
    mirrored = torch.randint(2, (17,), generator=random).bool()
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        got = crop_and_flip(layout, top, left, mirrored, padding)
        assert got.dtype == dtype and torch.equal(got, by_image(x, top, left, mirrored, padding))


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_cutout_zeroes_a_square_around_its_centre_and_nothing_else(size, side):
    random = torch.Generator().manual_seed(side)
    height, width = size
    x = torch.rand(17, 3, height, width, generator=random) + 0.1
    row, column = torch.randint(height, (17,), generator=random), torch.randint(width, (17,), generator=random)
    expected = x.clone()
    for image, r, c in zip(expected, row.tolist(), column.tolist()):
        top, left = r - side // 2, c - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    before = x.clone()
    got = cut_out(x, row, column, side)
    assert torch.equal(got, expected) and torch.equal(x, before)
    blanked = (got == 0).all(1).sum((1, 2))
    assert int(blanked.max()) <= side**2 and int(blanked.min()) >= 1


def test_augment_uses_its_whole_range_evenly():
    marked = torch.zeros(4000, 1, 9, 9)
    marked[:, :, 4, 4] = 1
    where = Augment(crop_padding=2)(marked, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    positions = where.bincount(minlength=81).reshape(9, 9)
    assert int(positions[2:7, 2:7].min()) > 100 and int(positions.sum()) == int(positions[2:7, 2:7].sum()) == 4000
    side = torch.zeros(4000, 1, 3, 4)
    side[..., 0] = 1
    flipped = Augment(flip=True)(side, torch.Generator().manual_seed(0))[:, 0, 0, 3].sum()
    assert 1850 < float(flipped) < 2150
    holes = (Augment(cutout=1)(torch.ones(4000, 1, 3, 4), torch.Generator().manual_seed(0)) == 0).sum((0, 1))
    assert int(holes.sum()) == 4000 and int(holes.min()) > 250


def test_each_part_does_only_its_own():
    x = torch.arange(1.0, 26.0).reshape(1, 1, 5, 5).repeat(64, 1, 1, 1)
    flipped = Augment(flip=True)(x, torch.Generator().manual_seed(0))
    assert all(torch.equal(image, x[0]) or torch.equal(image, x[0].flip(2)) for image in flipped)
    # Pixels grow along every row, unless a row was mirrored.
    inner = Augment(crop_padding=1)(x, torch.Generator().manual_seed(0))[:, 0, 1:4, 1:4]
    assert bool((inner.diff(dim=2) == 1).all())


def test_turning_one_part_on_leaves_the_others_as_they_were():
    x = torch.rand(64, 3, 9, 9) + 0.1
    plain = Augment(crop_padding=2)(x, torch.Generator().manual_seed(0))
    both = Augment(crop_padding=2, cutout=3)(x, torch.Generator().manual_seed(0))
    kept = both != 0
    assert torch.equal(both[kept], plain[kept]) and not torch.equal(both, plain)


def test_augment_switched_off_changes_nothing_and_bad_sizes_are_refused():
    x = torch.rand(5, 3, 9, 9)
    assert torch.equal(Augment()(x, torch.Generator()), x)
    for name in ("crop_padding", "cutout"):
        with pytest.raises(ValueError, match=f"augment.{name} must be 0 .off. or a number of pixels; got -1"):
            Augment(**{name: -1})


# Imports


def test_importing_data_loads_no_torchvision():
    code = "import sys, rnas.data; assert not {'torchvision', 'PIL', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
