"""Videos as fields, on videos made here."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from PIL import Image
from running import assert_refused, assert_resumes, trained

from torchimplicit import cli
from torchimplicit.recipes.representations import video as clips
from torchimplicit.recipes.representations.fit import Representation, decibels
from torchimplicit.recipes.representations.video import (
    VideoConfig,
    build,
    chosen,
    clip,
    over_frames,
    save,
    strip,
    synthesized,
    video,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


@pytest.fixture
def without_av(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(clips, "can_write_mp4", lambda: False)


def moving(frames=5, height=12, width=16):
    """A bright square that goes right, on a slope of colour."""
    y, x = np.mgrid[:height, :width]
    shown = []
    for number in range(frames):
        frame = np.stack([10 * y, 8 * x, 100 + 0 * x], -1).astype(np.uint8)
        frame[3:8, 2 * number : 2 * number + 5] = 255
        shown.append(frame)
    return torch.from_numpy(np.stack(shown))


def folder(tmp_path, frames=None, names=None):
    frames = moving() if frames is None else frames
    path = tmp_path / "frames"
    path.mkdir()
    for number, frame in enumerate(frames):
        name = names[number] if names else f"frame{number}.png"
        Image.fromarray(frame.numpy()).save(path / name)
    return path


def animated(tmp_path, name="a.gif", frames=None, **options):
    images = [Image.fromarray(frame.numpy()) for frame in (moving() if frames is None else frames)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=80, **options)
    return tmp_path / name


def encoded(tmp_path, frames=None, rate=10.0):
    pytest.importorskip("av")
    save(iter(moving() if frames is None else frames), rate, tmp_path / "a.mp4")
    return tmp_path / "a.mp4"


def read(path, **changes):
    clips._clip.cache_clear()  # a test may write the same file again
    return clip(VideoConfig(**{"file": path, "frames": None, "size": 64, **changes}))


class TestFolders:
    def test_frames_in_the_order_of_their_numbers(self, tmp_path):
        frames = moving(12)
        found = read(folder(tmp_path, frames))
        assert torch.equal(found.pixels, frames)
        assert found.rate == 25
        assert found.notes == ()

    def test_some_of_them(self, tmp_path):
        path = folder(tmp_path, moving(9))
        found = read(path, first=1, every=3, frames=2)
        assert torch.equal(found.pixels, moving(9)[[1, 4]])
        assert "every 3 frames from number 1" in found.notes[0]
        assert found.rate == pytest.approx(25 / 3)
        assert len(read(path, frames=4).pixels) == 4

    def test_what_is_no_picture_is_passed_over(self, tmp_path):
        path = folder(tmp_path)
        (path / "notes.txt").write_text("about the frames")
        assert len(read(path).pixels) == 5

    def test_grey_and_colour(self, tmp_path):
        path = folder(tmp_path)
        Image.fromarray(moving()[0].numpy()).convert("L").save(path / "frame1.png")
        found = read(path).pixels
        assert found.shape == (5, 12, 16, 3)
        assert (found[1, :, :, 0] == found[1, :, :, 1]).all()

    def test_larger_frames_are_reduced(self, tmp_path):
        found = read(folder(tmp_path, moving(3, 24, 32)), size=16)
        assert found.pixels.shape == (3, 12, 16, 3)
        assert found.notes == ("reduced from 32 × 24 pixels",)

    def test_bad_ones(self, tmp_path, monkeypatch):
        path = folder(tmp_path)
        for words, changes in (("no frame from", {"first": 9}), ("one frame", {"every": 9})):
            with pytest.raises(UserError, match=words):
                read(path, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(clips, "MOST_POINTS", 500)
            with pytest.raises(UserError, match="--frames"):
                read(path)
        Image.fromarray(moving(1, 20, 20)[0].numpy()).save(path / "frame3.png")
        with pytest.raises(UserError, match="number 3 would be 20 × 20"):
            read(path)
        (path / "frame2.png").write_text("no picture")
        with pytest.raises(UserError, match="not a picture"):
            read(path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="without pictures"):
            read(tmp_path / "empty")
        with pytest.raises(UserError, match="does not exist"):
            read(tmp_path / "none")


class TestAnimations:
    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
    def test_all_frames(self, tmp_path, name, without_av):
        found = read(animated(tmp_path, name, **({"lossless": True} if name == "a.webp" else {})))
        assert found.pixels.shape == (5, 12, 16, 3)
        difference = (found.pixels.int() - moving().int()).abs()
        assert difference.max() == 0 if name != "a.gif" else difference.float().mean() < 8
        assert found.rate == pytest.approx(12.5)

    def test_one_frame_is_a_picture(self, tmp_path):
        with pytest.raises(UserError, match="implicit-image"):
            read(animated(tmp_path, frames=moving(1)))

    def test_a_damaged_one_is_taken_as_far_as_it_goes(self, tmp_path):
        whole = animated(tmp_path, frames=moving(30)).read_bytes()
        (tmp_path / "cut.gif").write_bytes(whole[: len(whole) // 2])
        found = read(tmp_path / "cut.gif")
        assert 2 <= len(found.pixels) < 30

    def test_what_is_transparent_is_white(self, tmp_path):
        frames = [Image.fromarray(frame.numpy()).convert("RGBA") for frame in moving()]
        for frame in frames:
            frame.putpixel((0, 0), (0, 0, 0, 0))
        frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
        found = read(tmp_path / "a.png")
        assert (found.pixels[:, 0, 0] == 255).all()
        assert found.notes == ("its transparent parts on white",)


class TestVideoFiles:
    def test_round_trip(self, tmp_path):
        frames = moving(8, 32, 48)
        found = read(encoded(tmp_path, frames))
        assert found.pixels.shape == frames.shape
        assert found.rate == 10
        assert (found.pixels.float() - frames.float()).abs().mean() < 6, "but for what the codec loses"

    def test_odd_sides_are_made_even(self, tmp_path):
        assert read(encoded(tmp_path, moving(3, 13, 15))).pixels.shape == (3, 14, 16, 3)

    def test_grey_frames(self, tmp_path):
        assert read(encoded(tmp_path, moving(3, 32, 32)[..., :1])).pixels.shape == (3, 32, 32, 3)

    def test_without_the_extra(self, tmp_path, without_av):
        (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(50))
        with pytest.raises(UserError, match=r"torchimplicit\[video\]"):
            read(tmp_path / "a.mp4")

    def test_an_mpeg_file_is_no_picture(self, tmp_path):
        av = pytest.importorskip("av")
        with av.open(str(tmp_path / "a.mpg"), "w", format="mpeg1video") as container:
            stream = container.add_stream("mpeg1video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in moving(5, 32, 32):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
            container.mux(stream.encode())
        assert read(tmp_path / "a.mpg").pixels.shape == (5, 32, 32, 3)

    def test_what_is_no_video(self, tmp_path):
        pytest.importorskip("av")
        whole = encoded(tmp_path, moving(30, 32, 32)).read_bytes()
        (tmp_path / "text.mp4").write_text("no video")
        (tmp_path / "empty.mp4").write_bytes(b"")
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # what tells where frames are stands at the end
        for name in ("text.mp4", "empty.mp4", "cut.mp4"):
            with pytest.raises(UserError, match="not a video that FFmpeg can read"):
                read(tmp_path / name)
        import wave

        with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(4000))
        with pytest.raises(UserError, match="holds no video"):
            read(tmp_path / "sound.wav")

    def test_a_damaged_one_is_taken_as_far_as_it_goes(self, tmp_path):
        noise = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
        path = encoded(tmp_path, noise)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 4000] = b"\xff" * 4000
        path.write_bytes(data)
        found = read(path)
        assert 2 <= len(found.pixels) <= 40


class TestSynthesis:
    @pytest.mark.parametrize("name", ["shapes", "flight"])
    def test_something_moves(self, name):
        pytest.importorskip("skimage")
        made = synthesized(name, 4, 24)
        assert made.shape == (4, 24, 24, 3)
        assert made.dtype == torch.uint8
        assert (made[0].int() - made[3].int()).abs().float().mean() > 5


def small(tmp_path, **changes):
    return replace(
        video(),
        file=folder(tmp_path),
        representation=Representation(width=8),
        optimization=replace(video().optimization, steps=4, validate_every=2),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


class TestRecipe:
    def test_a_run_leaves_videos_and_pictures(self, tmp_path, without_av):
        run = trained("implicit-video", small(tmp_path, export_size=(7, 24, 32)), tmp_path / "run")
        for name, size, frames in (
            ("figures/comparison.gif", (48, 12), 5),
            ("reconstruction.gif", (16, 12), 5),
            ("export.gif", (32, 24), 7),
        ):
            with Image.open(run.path / name) as image:
                assert (image.size, image.n_frames) == (size, frames)
        assert not (run.path / "reconstruction.mp4").exists()
        for name in ("frames", "frames-psnr", "curve"):
            assert (run.path / "figures" / f"{name}.png").is_file()
        page = (run.path / "index.html").read_text()
        assert "5 frames of 16 × 12 pixels in colour" in page
        assert "data:image/gif" in page
        assert "export.gif" in page

    def test_with_the_extra_there_are_video_files(self, tmp_path):
        pytest.importorskip("av")
        run = trained("implicit-video", small(tmp_path, export_size=(32,)), tmp_path / "run")
        assert read(run.path / "reconstruction.mp4").pixels.shape == (5, 12, 16, 3)
        assert read(run.path / "export.mp4").pixels.shape == (5, 24, 32, 3)

    def test_frames_are_sampled_where_they_were_fitted(self, tmp_path):
        task = build(small(tmp_path))
        frames = torch.stack(list(clips.sampled_frames(task, (5, 12, 16))))
        torch.testing.assert_close(frames, task.on_grid((5, 12, 16)), atol=2e-2, rtol=1e-2)

    def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(self, tmp_path):
        config = small(tmp_path)
        config = replace(config, optimization=replace(config.optimization, batch_size=300))
        assert_resumes("implicit-video", config, tmp_path)

    def test_the_command_line(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        complaints = [
            (["--file", str(tmp_path / "empty")], "without pictures"),
            (["--file", str(tmp_path / "none.gif")], "does not exist"),
            (["--frames", "1"], "implicit-image"),
            (["--frames", "None"], "--file"),
            (["--size", "99999"], "--size"),
            (["--every", "0"], "--every"),
            (["--export-size", "1", "2", "3", "4"], "--export-size"),
            (["--clip", "cat"], "cat"),
            (["--memory-mb", "8", "--width", "1024"], "--memory-mb"),
        ]
        assert_refused(capsys, "implicit-video", tmp_path / "run", complaints)

    def test_a_finished_run_is_sampled_at_any_size(self, tmp_path, capsys, without_av):
        run = str(tmp_path / "run")
        words = ["--frames", "3", "--size", "10", "--width", "8", "--steps", "2", "--device", "cpu"]
        assert cli.main(["train", "implicit-video", *words, "--output", run]) == 0
        for sizes, expected in ((["20"], (3, 20, 20)), (["8", "14"], (3, 8, 14)), (["6", "9", "11"], (6, 9, 11))):
            assert cli.main(["evaluate", run, "--export-size", *sizes]) == 0
            with Image.open(tmp_path / "run" / "export.gif") as image:
                assert (image.n_frames, image.height, image.width) == expected
        capsys.readouterr()
        for sizes in (["0"], ["1", "2", "3", "4"], ["99999"]):
            assert cli.main(["evaluate", run, "--export-size", *sizes]) == 2
            assert "--export-size" in capsys.readouterr().err


class TestFigures:
    def test_frames_are_spread_over_the_video(self):
        assert chosen(2) == [0, 1]
        assert chosen(250) == [0, 50, 100, 149, 199, 249]

    def test_they_are_drawn(self):
        frames = list(moving())
        grey = [frame[..., :1] for frame in frames]
        assert len(strip({"video": frames, "field": grey}).axes) == 10
        assert len(over_frames([decibels(0.1, 2.0), 30.0]).axes) == 1


def test_gifs_are_no_faster_than_browsers_show(tmp_path):
    save(iter(moving()), 1000.0, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == clips.SHORTEST
