"""Image data sets, on made-up files."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch
from made_up_images import cifar_batch, idx, write_cifar, write_imagenet, write_mnist
from PIL import Image

from torchimplicit.recipes.phantom import image_files, imagenet, own_images
from torchimplicit.recipes.phantom.image_data import Selection, load, standardized
from torchimplicit.recipes.phantom.image_files import cifar10, mnist, read_batch, set_apart
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class TestSplits:
    def test_every_class_gives_its_share(self):
        labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
        chosen, rest = set_apart(labels, 20, 0, "these")
        assert torch.bincount(labels[chosen]).tolist() == [12, 6, 2]
        assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(100))

    def test_it_depends_on_the_seed_alone(self):
        labels = torch.arange(100) % 10
        assert torch.equal(set_apart(labels, 30, 1, "")[0], set_apart(labels, 30, 1, "")[0])
        assert not torch.equal(set_apart(labels, 30, 1, "")[0], set_apart(labels, 30, 2, "")[0])
        assert torch.equal(set_apart(labels, 30, 1, "")[0][:20], set_apart(labels, 20, 1, "")[0])

    def test_no_image_is_in_two(self, tmp_path):
        splits = load("mnist", write_mnist(tmp_path / "data"), validation=10, train=20, test=10)
        seen = [set(part.images[:, 0, 0, 0].tolist()) for part in (splits.train, splits.validation)]
        assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [20, 10, 10]
        assert not seen[0] & seen[1]
        assert torch.bincount(splits.validation.labels).tolist() == [1] * 10
        assert torch.equal(splits.train.images[:, 0, 0, 0] % 10, splits.train.labels)

    def test_standardized_images_have_mean_zero_and_deviation_one(self):
        splits = load("digits", validation=300)
        images = standardized(torch.cat([splits.train.images, splits.validation.images]), splits.mean, splits.deviation)
        assert images.dtype == torch.float32
        assert abs(float(images.mean())) < 0.01
        assert abs(float(images.std()) - 1) < 0.01
        assert len(splits.test.labels) == 360

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"validation": 41}, "41 images were asked for"),
            ({"validation": 40}, "all are set apart"),
            ({"validation": 10, "train": 31}, "31 images were asked for"),
            ({"validation": 10, "test": 21}, "the test part of mnist"),
        ],
    )
    def test_too_few_images(self, tmp_path, options, words):
        with pytest.raises(UserError, match=words):
            load("mnist", write_mnist(tmp_path / "data"), **options)


class TestMnist:
    def test_plain_files_and_the_layout_of_torchvision(self, tmp_path):
        raw = write_mnist(tmp_path / "MNIST" / "raw")
        packed = raw / "t10k-images-idx3-ubyte.gz"
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
        train, test = mnist(tmp_path)
        assert train.images.shape == (40, 1, 28, 28)
        assert test.images[7, 0, 3, 3] == 7

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda b: b[: len(b) // 2], "cut short"),
            (lambda b: b"PK" + b[2:], "no gzip file"),
            (lambda b: gzip.compress(idx(np.zeros((40, 28, 28)), kind=13)), "another kind of file"),
            (lambda b: gzip.compress(idx(np.zeros(40))), "another kind of file"),
            (lambda b: gzip.compress(gzip.decompress(b)[:-5]), "announces 40×28×28 bytes"),
            (lambda b: gzip.compress(b""), "begins with nothing"),
            (lambda b: gzip.compress(idx(np.zeros((39, 28, 28)))), "39 images"),
        ],
    )
    def test_a_spoilt_file_is_named(self, tmp_path, spoil, words):
        path = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(UserError, match=words) as caught:
            mnist(tmp_path)
        assert str(path) in str(caught.value)

    def test_a_missing_folder_and_a_wrong_one(self, tmp_path):
        with pytest.raises(UserError, match="not a folder"):
            load("mnist", tmp_path / "nowhere", validation=1)
        with pytest.raises(UserError, match="train-images-idx3-ubyte"):
            load("mnist", write_cifar(tmp_path / "cifar"), validation=1)

    def test_images_of_another_size(self, tmp_path):
        write_mnist(tmp_path)
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((40, 20, 28)))))
        with pytest.raises(UserError, match="1×20×28"):
            load("mnist", tmp_path, validation=1)


class TestCifar:
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_the_published_layout(self, tmp_path, protocol):
        write_cifar(tmp_path / "cifar-10-batches-py", protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train, test = cifar10(tmp_path)
        assert train.images.shape == (100, 3, 32, 32)
        assert train.images[5, :, 2, 3].tolist() == [255, 25, 25]
        assert test.labels.tolist() == [i % 10 for i in range(20)]
        again, _ = cifar10(tmp_path / "cifar-10-batches-py")
        assert torch.equal(again.images, train.images)

    def test_the_archive(self, tmp_path):
        write_cifar(tmp_path / "cifar-10-batches-py")
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
        (tmp_path / "only").mkdir()
        path = (tmp_path / "cifar-10-python.tar.gz").rename(tmp_path / "only" / "cifar-10-python.tar.gz")
        assert len(cifar10(path.parent)[0].labels) == 100
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(UserError, match="cut short"):
            cifar10(path.parent)

    def test_a_pickle_calls_nothing_but_numpy(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (exec, ("raise SystemExit",))

        folder = write_cifar(tmp_path / "data")
        (folder / "data_batch_3").write_bytes(pickle.dumps(Evil(), 2))
        with pytest.raises(UserError, match=r"data_batch_3.*exec"):
            cifar10(folder)

    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            ([1, 2], "data, n×3072"),
            (cifar_batch() | {b"data": np.zeros((20, 100), np.uint8)}, "data, n×3072"),
            (cifar_batch() | {b"data": np.zeros((20, 3072))}, "data, n×3072"),
            (cifar_batch() | {b"labels": [0] * 19}, "n labels"),
            (cifar_batch() | {b"labels": [10] * 20}, "label"),
        ],
    )
    def test_pickles_of_something_else(self, batch, words):
        with pytest.raises(UserError, match=words):
            read_batch(pickle.dumps(batch, 2), "batch")

    def test_files_that_are_missing_or_cut_short(self, tmp_path):
        folder = write_cifar(tmp_path / "data")
        path = folder / "data_batch_2"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match=r"data_batch_2.*truncated"):
            cifar10(folder)
        path.unlink()
        with pytest.raises(UserError, match="data_batch_2"):
            cifar10(folder)
        with pytest.raises(UserError, match="holds no CIFAR-10"):
            cifar10(write_mnist(tmp_path / "mnist"))


class TestBinary:
    def write(self, folder, images=20):
        rng = np.random.default_rng(0)
        for name in ("data_batch_1.bin", "test_batch.bin"):
            rows = np.concatenate([np.arange(images)[:, None] % 10, rng.integers(256, size=(images, 3072))], axis=1)
            (folder / name).write_bytes(rows.astype(np.uint8).tobytes())

    @pytest.mark.parametrize("place", ["", "cifar-10-batches-bin"])
    def test_the_binary_version_is_read(self, tmp_path, place):
        (tmp_path / place).mkdir(exist_ok=True)
        self.write(tmp_path / place)
        found = load("cifar10", tmp_path, validation=5)
        assert found.train.images.shape == (15, 3, 32, 32)
        assert found.test.labels.tolist() == [*range(10), *range(10)]

    def test_a_file_cut_short_is_named(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "test_batch.bin").write_bytes(b"\0" * 5000)
        with pytest.raises(UserError, match=r"test_batch\.bin has 5000 bytes, and images have 3073 each"):
            load("cifar10", tmp_path, validation=5)


class TestOwnImages:
    def write(self, folder, count=10, classes=("cat", "dog")):
        for label, name in enumerate(classes):
            (folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((12 + number, 20, 3), 40 + 150 * label, np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number}.png")

    @pytest.mark.parametrize("parts", [(), ("train", "test"), ("train", "val")])
    def test_a_folder_for_each_class(self, tmp_path, parts):
        for part in parts or ("",):
            self.write(tmp_path / part)
        selection = Selection(data_dir=tmp_path, validation_images=4)
        found = own_images.load(selection, 16, "grey" if parts else "colour")
        channels = 1 if parts else 3
        assert found.train.images.shape == (16 if parts else 12, channels, 16, 16)
        assert len(found.test.labels) == (20 if parts else 4)
        assert (found.train.images[found.train.labels == 1] == 190).all()
        assert len(found.mean) == channels
        assert own_images.names_of(tmp_path)[0] == ["cat", "dog"]

    def test_what_is_refused(self, tmp_path):
        (tmp_path / "cat").mkdir()
        with pytest.raises(UserError, match="two classes or more, and it holds cat"):
            own_images.names_of(tmp_path)
        (tmp_path / "dog").mkdir()
        with pytest.raises(UserError, match="cat holds no images"):
            own_images.load(Selection(data_dir=tmp_path, validation_images=1), 8, "colour")
        for name in ("cat", "dog"):
            (tmp_path / name / "broken.png").write_bytes(b"x")
        with pytest.raises(UserError, match=r"broken\.png is no image"):
            own_images.load(Selection(data_dir=tmp_path, validation_images=1), 9, "colour")


class TestImageNet:
    def test_splits_and_labels(self, tmp_path):
        parts = imagenet.load(write_imagenet(tmp_path), validation=2, classes=2)
        assert [part.labels.tolist().count(1) for part in parts] == [3, 1, 2]
        assert not set(parts[0].paths) & set(parts[1].paths)
        assert all(path.parent.name == ("n01", "n02")[label] for part in parts for path, label in zip(*rows(part)))

    def test_crops(self, tmp_path):
        train, _, test = imagenet.load(write_imagenet(tmp_path), validation=2, classes=2)
        image, label = imagenet.Crops(test, 32)[3]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.uint8
        assert abs(int(image[0, 16, 16]) - 41) < 3
        assert int(label) == 1
        varied = imagenet.Crops(train, 32, seed=0)
        assert torch.equal(varied[(0, 1)][0], varied[(0, 1)][0])

    def test_random_parts_follow_their_seed_and_are_flipped_half_the_time(self):
        ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
        image = Image.fromarray(np.ascontiguousarray(ramp))
        parts = [np.asarray(imagenet.random_part(image, 16, torch.Generator().manual_seed(i))) for i in range(60)]
        again = np.asarray(imagenet.random_part(image, 16, torch.Generator().manual_seed(5)))
        assert np.array_equal(parts[5], again)
        flipped = sum(int(p[0, 0, 0]) > int(p[0, -1, 0]) for p in parts)
        assert 15 < flipped < 45
        assert len({p.tobytes() for p in parts}) == 60

    def test_the_centre_is_the_middle_seven_eighths_of_the_short_side(self):
        pixels = np.zeros((64, 128, 3), dtype=np.uint8)
        pixels[4:60, 36:92] = 255
        assert np.asarray(imagenet.centre(Image.fromarray(pixels), 56)).min() == 255

    def test_a_very_long_image(self):
        image = Image.new("RGB", (1000, 5))
        assert imagenet.random_part(image, 8, torch.Generator().manual_seed(0)).size == (8, 8)

    def test_folders_that_are_missing_empty_or_different(self, tmp_path):
        with pytest.raises(UserError, match="train is missing"):
            imagenet.load(tmp_path, validation=0)
        write_imagenet(tmp_path)
        with pytest.raises(UserError, match="2 classes, and there must be 1000"):
            imagenet.load(tmp_path, validation=0)
        (tmp_path / "train" / "n03").mkdir()
        with pytest.raises(UserError, match="n03"):
            imagenet.load(tmp_path, validation=0, classes=2)
        (tmp_path / "val" / "n03").mkdir()
        with pytest.raises(UserError, match="no images"):
            imagenet.load(tmp_path, validation=0, classes=3)
        with pytest.raises(UserError, match="without an account"):
            imagenet.load(None, validation=0)

    def test_a_spoilt_image_is_named(self, tmp_path):
        train, _, _ = imagenet.load(write_imagenet(tmp_path), validation=2, classes=2)
        train.paths[0].write_bytes(b"no image")
        with pytest.raises(UserError, match=str(train.paths[0])):
            imagenet.Crops(train, 32)[0]


def rows(part):
    return part.paths, part.labels.tolist()


class TestFetch:
    def make(self, tmp_path, content=b"the data", **changes):
        source = tmp_path / "source"
        source.write_bytes(content)
        digest = hashlib.sha256(b"the data").hexdigest()
        return Download(**{"name": "file", "url": source.as_uri(), "sha256": digest, **changes})

    def test_a_file_is_downloaded_once(self, tmp_path):
        download = self.make(tmp_path)
        path = fetch(download, cache_folder("made-up"))
        assert path.read_bytes() == b"the data"
        assert path.is_relative_to(tmp_path / "cache" / "torchimplicit")
        (tmp_path / "source").unlink()
        assert fetch(download, cache_folder("made-up")) == path

    def test_another_content_is_refused_and_leaves_nothing(self, tmp_path):
        with pytest.raises(UserError, match="SHA-256"):
            fetch(self.make(tmp_path, b"the dat"), tmp_path / "kept")
        assert not list((tmp_path / "kept").iterdir())

    def test_no_network(self, tmp_path):
        with pytest.raises(UserError, match="--data-dir"):
            fetch(self.make(tmp_path, url=(tmp_path / "nowhere").as_uri()), tmp_path / "kept")

    def test_mnist_is_downloaded_where_no_folder_is_given(self, tmp_path, monkeypatch):
        write_mnist(tmp_path / "public")
        files = [
            Download(
                name=file.name,
                url=(tmp_path / "public" / file.name).as_uri(),
                sha256=hashlib.sha256((tmp_path / "public" / file.name).read_bytes()).hexdigest(),
            )
            for file in image_files.MNIST
        ]
        monkeypatch.setattr(image_files, "MNIST", files)
        assert len(load("mnist", validation=10).train.labels) == 30
