"""What people may hand to the readers: damaged, absurd and hostile files are refused in a line, without the memory."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from PIL import Image

from torchimplicit.recipes.density import sources, storage
from torchimplicit.recipes.runtime.errors import UserError

LARGE = 10**12


@pytest.fixture(autouse=True)
def _little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


class Evil:
    """Would end the tests if a reader called what it unpickles."""

    def __reduce__(self):
        return os._exit, (3,)


def refused(read, content: bytes | str | Path, path: Path) -> str:
    """The one line with which a reader answers a file."""
    if isinstance(content, Path):
        path = content
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def picture(size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def zipped(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(shape: object, data: bytes = b"", kind: str = "'<f4'") -> bytes:
    head = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + data


class TestMolecules:
    GOOD = "2\nhydrogen\nH 0 0 0\nH 0.74 0 0\n"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("1000000\nc\n" + "".join(f"H {i} 0 0\n" for i in range(1000000)), "more than 1048576 bytes"),
            ("20000\nc\n" + "".join(f"H {i} 0 0\n" for i in range(20000)), "1000 at most"),
            ("1000000\nc\nH 0 0 0\n", "1000 at most"),
            ("9" * 5000 + "\nc\nH 0 0 0\n", "not a number of atoms"),
            ("1_0\nc\n" + "H 0 0 0\n" * 10, "not a number of atoms"),
            ("٢\nc\nH 0 0 0\nH 1 0 0\n", "not a number of atoms"),
            ("-2\nc\nH 0 0 0\n", "is none"),
            ("2\nc\nH 0 0 0\nH nan 0 0\n", "not finite"),
            ("2\nc\nH 0 0 0\nH 1e999 0 0\n", "not finite"),
            ("2\nc\nH 0 0 0\nH 1e300 0 0\n", "in angstrom"),
            ("2\nc\nH 0 0 0\nH 1_0 0 0\n", "not a coordinate"),
            ("2\nc\nH 0 0 0\nH " + "9" * 900000 + " 0 0\n", "not finite"),
            ("2\nc\nH 0 0 0\nH 0 0 0\n", "overlap"),
            ("2\nc\nH 0 0 0\n", "cut short"),
            ("", "is empty"),
            ("# made by hand\n" + GOOD, "not a number of atoms"),
            ("1" + GOOD[1:], "more after the 1 atoms"),
            (GOOD + GOOD, "cut a trajectory"),
            ("0\n\n" + GOOD, "is none"),
            (GOOD.replace("hydrogen", "in Bohr"), "line 2 says 'Bohr'"),
            (GOOD.replace("hydrogen", "units=pm"), "must be in angstrom"),
            (GOOD.replace("0.74", "0.74A"), "not a coordinate"),
            (GOOD.replace("hydrogen", "Properties=species:S:1:forces:R:3:pos:R:3"), "must begin with species"),
            (GOOD.replace("hydrogen", 'Lattice="9 0 0 0 9 0 0 0 9" pbc="T T T"'), "repeat in a cell"),
            (GOOD.replace("hydrogen", "charge=2"), "give --charge 2"),
            (GOOD.replace("H 0.74", "Xx 0.74"), "no element 'Xx'"),
            (GOOD.encode("utf-16"), "not text"),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_xyz(self, tmp_path, text, said):
        assert said in refused(lambda path: sources.read(str(path)), text, tmp_path / "m.xyz")

    def test_what_is_not_refused(self, tmp_path):
        path = tmp_path / "m.xyz"
        kept = 'Lattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3:forces:R:3 charge=0 pbc="F F F"'
        for text in (
            "\ufeff" + self.GOOD,
            self.GOOD.replace("\n", "\r\n"),
            self.GOOD.replace(" ", "\t") + "\n\n",
            self.GOOD.replace("hydrogen", "converted from bohr to angstrom, E = -1.17 a.u."),
            self.GOOD.replace("hydrogen", kept),
        ):
            path.write_text(text, newline="")
            [found] = sources.read(str(path))
            assert found.positions[1][0] == pytest.approx(0.74 * 1.8897261)

    def test_a_file_that_takes_no_room_on_the_disk(self, tmp_path):
        path = tmp_path / "sparse.xyz"
        with path.open("wb") as file:
            file.truncate(10**11)
        assert "bytes" in refused(lambda path: sources.read(str(path)), path, path)
        [found] = sources.read(str(tmp_path))
        assert isinstance(found, sources.Refused)

    @pytest.mark.parametrize("name", ["../../out.xyz", "/etc/out.xyz", "a/../../out.xyz", "..\\out.xyz", "C:/out.xyz"])
    def test_an_archive_with_paths_outside(self, tmp_path, name):
        def archive(member: str) -> Path:
            with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as made:
                for kind in (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.REGTYPE):
                    one = tarfile.TarInfo(member)
                    one.type, one.linkname = kind, "/etc/passwd"
                    one.size = len(self.GOOD) if kind == tarfile.REGTYPE else 0
                    made.addfile(one, io.BytesIO(self.GOOD.encode()))
            return tmp_path / "some.tar.gz"

        assert "outside" in refused(lambda path: sources.read(str(path)), archive(name), tmp_path)
        [found] = sources.read(str(archive("./in/..out.xyz")))
        assert found.name == "..out", "of links and devices nothing is read"

    def test_archives_that_are_none(self, tmp_path):
        one = tarfile.TarInfo("a.xyz")
        one.size = LARGE
        for content in (one.tobuf() + b"x" * 512, b"no archive", os.urandom(2000), gzip.compress(b"no archive"), b""):
            refused(lambda path: sources.read(str(path)), content, tmp_path / "a.tar.gz")

    def test_computed_molecules(self, tmp_path):
        about, digest = npy((4,), b"[" * 4, "'|u1'"), npy((1,), b"0000")
        deep = npy((200000,), b"[" * 200000, "'|u1'")
        for parts in (
            {"about.npy": about, "sha256.npy": digest},
            {"about.npy": deep, "sha256.npy": digest},
            {"about.npy": npy((LARGE,), b"0"), "sha256.npy": digest},
            {"about.npy": bytes(1 << 26), "sha256.npy": digest},
            {"about.npy": npy((1,), pickle.dumps(Evil()), "'|O'"), "sha256.npy": digest},
            {"../about.npy": about},
        ):
            refused(storage.read, zipped(parts), tmp_path / "m.npz")
        kept = Path(__file__).parents[2] / "data" / "h2.npz"
        right, whole, accepted = storage.read(kept), kept.read_bytes(), 0
        for place in range(0, len(whole), len(whole) // 60):
            changed = bytearray(whole)
            changed[place] ^= 16
            try:
                found = storage.read(_written(tmp_path / "m.npz", bytes(changed)))
            except UserError:
                continue
            accepted += 1  # the archive also holds dates, which nobody reads
            assert found.geometry == right.geometry
            assert all(torch.equal(one, right.tensors()[name]) for name, one in found.tensors().items())
        assert accepted < 6


PLACES = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n"
FACES = ((1, 3, 2), (1, 2, 4), (1, 4, 3), (2, 3, 4))


def obj(*shifts: int, places: str = PLACES) -> str:
    shift = shifts[0] if shifts else 0
    return places + "".join(f"f {a + shift} {b + shift} {c + shift}\n" for a, b, c in FACES)


def ply(vertices: int, faces: int, body: bytes | None = None, form: str = "ascii") -> bytes:
    head = (
        f"ply\nformat {form} 1.0\nelement vertex {vertices}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    if body is None:
        lines = [line[2:] for line in PLACES.splitlines()] + [f"3 {a - 1} {b - 1} {c - 1}" for a, b, c in FACES]
        body = "\n".join(lines).encode() + b"\n"
    return head.encode() + body


class TestMeshes:
    def read(self, path):
        pytest.importorskip("trimesh")
        from torchimplicit.recipes.representations.mesh import prepared, read_file

        return prepared(read_file(path, 10000), path.name)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.obj", obj(-1), "line 5: 'f 0 2 1': vertices are counted from 1"),
            ("a.obj", obj() + "f 1// 0// 2//\n", "there is none of number 0"),
            ("a.obj", obj() + "f -5 1 2\n", "goes 5 back"),
            ("a.obj", obj() + "f 1 2 99\n", "line 9: a face names vertex 99, and there are 4"),
            ("a.obj", obj() + f"f 1 2 {10**30}\n", "number of a vertex"),
            ("a.obj", obj() + "f 1 2 3.5\n", "number of a vertex"),
            ("a.obj", obj(places=PLACES.replace("1", "nan", 1)), "NaN"),
            ("a.obj", obj(places=PLACES.replace("1", "1e999", 1)), "infinite"),
            ("a.obj", obj(places=PLACES.replace("1 0 0", "1 0", 1)), "three numbers"),
            ("a.obj", obj(places=PLACES.replace("1", "1_0", 1)), "three numbers"),
            ("a.obj", PLACES, "no faces"),
            ("a.obj", PLACES + "f 1 2 3\n" * 10001, "more than 10000 faces"),
            ("a.obj", os.urandom(3000), "no faces"),
            ("a.ply", ply(LARGE, 4), "promises"),
            ("a.ply", ply(4, LARGE), "promises"),
            ("a.ply", ply(4, 10**30), "promises"),
            ("a.ply", ply(-1, 4), "does not say how many"),
            ("a.ply", ply(4, 3), "promises 7 vertices and faces, and 8 lines follow"),
            ("a.ply", ply(4, 4) + ply(4, 4), "more than one mesh"),
            ("a.ply", ply(4, 4).replace(b"1 0 0", b"nan 0 0", 1), "NaN"),
            ("a.ply", ply(4, 4).replace(b"1 0 0", b"1m 0 0", 1), "cannot be read"),
            ("a.obj", obj(places=PLACES.replace("1 0 0", "1mm 0 0", 1)), "three numbers"),
            ("a.obj", obj().encode("utf-16"), "no faces"),
            ("a.ply", ply(4, 4)[:-12], "promises"),
            ("a.ply", ply(4, 4).replace(b"3 0 2 1", b"3 0 2 -1"), "not there"),
            ("a.ply", ply(LARGE, 4, bytes(100), "binary_little_endian"), "cannot be read"),
            ("a.ply", ply(4, LARGE, bytes(100), "binary_little_endian"), "cannot be read"),
            ("a.ply", b"ply\nformat ascii 1.0\n" + b"comment x\n" * 10000, "does not say how many"),
            ("a.off", f"OFF\n{LARGE} 4 0\n0 0 0\n", "promises"),
            ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n", "promises"),
            ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n", "range"),
            ("a.stl", bytes(80) + struct.pack("<I", 4 * 10**9) + bytes(50), "no faces"),
            ("a.stl", b"", "no faces"),
            ("a.ply", b"", "does not say how many"),
            ("a.off", b"", "does not say how many"),
        ],
    )
    def test_refused(self, tmp_path, name, content, said):
        assert said in refused(self.read, content, tmp_path / name)

    def test_what_is_not_refused(self, tmp_path):
        path = tmp_path / "a.obj"
        texts = [
            obj(),
            obj(-5),
            obj().replace("\n", "\r\n"),
            "\ufeff" + obj(-5),
            obj().replace("f 1 3 2", "f 1/9/9 3/9/9 \\\n2/9/9 # here"),
        ]
        texts.append("v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -1 -2\nv 0 0 1\nf -4 -3 -1\nf -4 -1 -2\nf -3 -2 -1\n")
        for text in texts:
            path.write_text(text, newline="")
            mesh, notes = self.read(path)
            assert (mesh.volume, notes) == (pytest.approx(1 / 6), ())
        (tmp_path / "a.ply").write_bytes(ply(4, 4))
        assert self.read(tmp_path / "a.ply")[0].volume == pytest.approx(1 / 6)
        (tmp_path / "a.ply").write_bytes(ply(4, 4).replace(b"element face", b"comment here\nelement face"))
        assert self.read(tmp_path / "a.ply")[0].volume == pytest.approx(1 / 6)


class TestPictures:
    @pytest.mark.parametrize(
        "content",
        [
            png(60000, 60000),
            png(2**31 - 1, 2**31 - 1),
            png(0, 0),
            png(9999, 9999),
            png(64, 64, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26), 9))),
            png(64, 64, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 26), 9))),
            picture()[:900],
            picture(kind="JPEG")[:300],
            b"P6\n100000 100000\n255\n",
            b"<svg/>",
            b"",
        ],
        ids=range(11),
    )
    def test_fields(self, tmp_path, content):
        from torchimplicit.recipes.representations.image import read_file

        refused(lambda path: read_file(path, 256), content, tmp_path / "p.png")

    def test_data_sets(self, tmp_path):
        from torchimplicit.recipes.phantom import imagenet

        for content in (png(60000, 60000), picture()[:900], b""):
            path = tmp_path / "train_0_airplane.png"
            _written(path, content)
            listing = imagenet.Listing((path,), torch.zeros(1, dtype=torch.long))
            refused(lambda _, one=listing: imagenet.Crops(one)[0], path, path)

    def test_videos(self, tmp_path):
        from torchimplicit.recipes.representations.video import VideoConfig, clip

        def read(path):
            return clip(VideoConfig(file=path, size=64))

        gif = bytearray(picture(kind="GIF"))
        gif[6:10] = b"\xff" * 4
        playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
        for content in (bytes(gif), picture(), os.urandom(3000), b"", b"\0\0\0\x18ftypisom\0\0\0\0isommp42", playlist):
            refused(read, content, tmp_path / "clip.bin")


class TestSounds:
    def wav(self, data: bytes, **changed: int) -> bytes:
        f = {"form": 1, "channels": 1, "rate": 8000, "bits": 16, "block": 2, "said": len(data), "head": 16} | changed
        head = struct.pack("<HHIIHH", f["form"], f["channels"], f["rate"], 16000, f["block"], f["bits"])
        body = b"WAVEfmt " + struct.pack("<I", f["head"]) + head + b"data" + struct.pack("<I", f["said"]) + data
        return b"RIFF" + struct.pack("<I", len(body)) + body

    def read(self, path):
        from torchimplicit.recipes.representations.audio import read_file

        return read_file(path, 0.0, None, 44100, False)

    @pytest.mark.parametrize(
        "changed",
        [
            {"channels": 0},
            {"channels": 65535},
            {"rate": 0},
            {"rate": 2**32 - 1},
            {"bits": 65535},
            {"form": 0x55},
            {"head": 2**32 - 1},
            {"head": 0},
            {"said": 0},
        ],
        ids=str,
    )
    def test_headers(self, tmp_path, changed):
        refused(self.read, self.wav(np.arange(4000, dtype="<i2").tobytes(), **changed), tmp_path / "s.wav")

    def test_contents(self, tmp_path):
        whole = self.wav(np.arange(4000, dtype="<i2").tobytes())
        for values in ([np.nan] * 1000, [np.inf] + [1.0] * 999):
            data = np.array(values, "<f4").tobytes()
            refused(self.read, self.wav(data, form=3, bits=32, block=4), tmp_path / "s.wav")
        for content in (b"", whole[:12], whole[:44], b"fLaC" + whole, self.wav(bytes(8000))):
            refused(self.read, content, tmp_path / "s.wav")

    def test_a_length_that_is_not_there_is_said(self, tmp_path):
        (tmp_path / "s.wav").write_bytes(self.wav(np.arange(4000, dtype="<i2").tobytes(), said=2**32 - 2))
        assert any("cut short" in note for note in self.read(tmp_path / "s.wav").notes)


class TestDataSets:
    def test_idx(self, tmp_path):
        from torchimplicit.recipes.phantom import image_files as mnist

        def idx(*shape: int) -> bytes:
            return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)

        def read(path):
            return mnist.read_idx(path, 3)

        assert tuple(mnist.read_idx(_written(tmp_path / "e", idx(3, 0, 0)), 3).shape) == (3, 0, 0)
        for content in (idx(2**32 - 1, 2**32 - 1, 2**32 - 1), idx(2, 3, 3), b"", b"\x1f\x8b"):
            refused(read, content, tmp_path / "images")
        packed = bytearray(gzip.compress(idx(2, 3, 3) + os.urandom(18)))
        packed[30] ^= 8
        for content in (bytes(packed), gzip.compress(idx(2, 3, 3) + bytes(18))[:-9], b"no gzip"):
            refused(read, content, tmp_path / "images.gz")
        with (tmp_path / "images").open("wb") as file:
            file.truncate(1 << 40)
        mnist_limit = mnist.LARGEST_FILE
        try:
            mnist.LARGEST_FILE = 1 << 20
            assert "more than" in refused(read, tmp_path / "images", tmp_path / "images")
            assert "more than" in refused(read, gzip.compress(bytes(1 << 22)), tmp_path / "images.gz")
        finally:
            mnist.LARGEST_FILE = mnist_limit

    def test_pickles(self):
        from torchimplicit.recipes.phantom.image_files import read_batch

        array = np.zeros((2, 3072), np.uint8)
        for content in (
            pickle.dumps(Evil()),
            f"cnumpy\nndarray\n((L{LARGE}L\ntR.".encode(),
            b"(" * 100000 + b"t" * 100000 + b".",
            b"\x80\x04\x8e" + struct.pack("<Q", 2**62),
            pickle.dumps(3),
            pickle.dumps({b"data": array, b"labels": [0, 99]}),
            pickle.dumps({b"data": array, b"labels": [0]}),
            b"",
        ):
            with pytest.raises(UserError) as caught:
                read_batch(content, "batch")
            assert "\n" not in str(caught.value)

    def test_drawings(self, tmp_path):
        from torchimplicit.recipes.joint.meta import _read

        drawing = picture((105, 105))
        encrypted = bytearray(zipped({"a/c/0.png": drawing}))
        for start in (0, encrypted.rfind(b"PK\1\2")):
            encrypted[start + (6 if start == 0 else 8)] |= 1
        for content in (
            zipped({"a/c/0.png": bytes(1 << 24)}),
            zipped({"a/c/0.png": png(60000, 60000)}),
            zipped({f"a/c/{i}.png": b"text" for i in range(20)}),
            zipped({"a/c/0.png": drawing}),
            zipped({f"../c/{i}.png": drawing for i in range(20)}),
            zipped({}),
            zipped({"a/c/0.png": drawing})[:-30],
            bytes(encrypted),
            b"",
        ):
            refused(_read, content, tmp_path / "d.zip")

    @pytest.mark.parametrize(
        "content",
        [
            npy((10**6, 10**6), b"x"),
            npy((-1, 2), bytes(16)),
            npy((10**30, 2), bytes(8)),
            npy((1, 1), pickle.dumps(Evil()), "'|O'"),
            npy((2, 2), bytes(9)),
            npy((2, 2), np.full(4, np.nan, "<f4").tobytes()),
            npy((2, 2), bytes(16), "[('a', '<f4')]"),
            npy("(" * 30 + ")" * 30),
            zipped({"a.npy": npy((1, 1), bytes(4))}),
            pickle.dumps(Evil()),
            b"",
        ],
        ids=range(11),
    )
    def test_arrays(self, tmp_path, content):
        pytest.importorskip("torch_geometric")
        from torchimplicit.recipes.phantom.graph_data import _array

        refused(lambda path: _array(path, 2), content, tmp_path / "x.npy")

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 10**6,
            '{"links":' * 10**5 + "1" + "}" * 10**5,
            '{"links": [{"source": ' + "9" * 10000 + ', "target": 1}]}',
            *(
                f'{{"links": [{{"source": {one}, "target": 1}}]}}'
                for one in ("1e30", "0.7", "NaN", "-1", "true", '"1"', "null", "7")
            ),
            '{"links": "abc"}',
            "[]",
            "",
        ],
        ids=lambda text: text[:30],
    )
    def test_graphs_in_json(self, tmp_path, text):
        pytest.importorskip("torch_geometric")
        from torchimplicit.recipes.phantom.graph_data import _links as _edges

        refused(lambda path: _edges(path, np.zeros(3, np.int64)), text, tmp_path / "g.json")

    @pytest.mark.parametrize(
        "changed",
        [
            {"graph_indicator": f"1\n1\n2\n{LARGE}\n"},
            {"A": "1, 99999999999999999999\n"},
            {"A": "0, 1\n1, 0\n"},
            {"A": "1.5, 2\n"},
            {"A": "1, 2\n2, 1, 3\n"},
            {"A": "\0\1\2"},
            {"node_attributes": "1\nnan\n2\n3\n"},
            {"node_attributes": "1\n1e999\n2\n3\n"},
        ],
        ids=str,
    )
    def test_graphs_in_text(self, tmp_path, changed):
        pytest.importorskip("torch_geometric")
        from torchimplicit.recipes.phantom import graph_data as tu

        whole = {"A": "1, 2\n2, 1\n3, 4\n4, 3\n", "graph_indicator": "1\n1\n2\n2\n", "graph_labels": "0\n1\n"}
        for name, text in (whole | {"node_labels": "0\n1\n0\n1\n"} | changed).items():
            (tmp_path / f"COX2_{name}.txt").write_text(text)
        refused(lambda path: tu.load("COX2", path, attributes=True), tmp_path, tmp_path)


def test_texts(tmp_path):
    from torchimplicit.recipes.phantom import language_data as data

    for split in data.SPLITS:
        (tmp_path / data.file_name(split)).write_text("a text\n")
    for content in (bytes(1 << 25), b"a" * (1 << 25), os.urandom(2000), b"\n\n", b""):
        (tmp_path / "wiki.test.tokens").write_bytes(content)
        refused(data.read, tmp_path, tmp_path)


def test_files_that_take_no_room_on_the_disk(tmp_path):
    """They are larger than any that is meant, and are not read to be told so."""
    pytest.importorskip("torch_geometric")
    from torchimplicit.recipes.phantom import graph_data as tu
    from torchimplicit.recipes.phantom import image_files
    from torchimplicit.recipes.runtime.log import rows
    from torchimplicit.recipes.runtime.run import Run

    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(10**11)
    readers = (
        lambda path: Run(tmp_path).read(),
        lambda path: tu._links(path, np.zeros(3, np.int64)),
        tu._integers,
        image_files._read,
        image_files._published,
        rows,
    )
    for read in readers:
        refused(read, path, path)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
