"""Pictures as fields, on pictures made here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from PIL import Image
from running import assert_refused, trained

from torchimplicit import cli
from torchimplicit.recipes.representations import image as pictures
from torchimplicit.recipes.representations.fit import Grid, Representation
from torchimplicit.recipes.representations.image import (
    BUNDLED,
    build,
    bundled,
    error_map,
    export_sizes,
    generalization,
    image,
    parts,
    quantized,
    read_file,
    save,
    written,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine
from torchimplicit.recipes.runtime.trainer import Results


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


def colours(height=20, width=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([8 * y, 8 * x, 128 + 0 * x], -1).clip(0, 255).astype(np.uint8)


def written_as(tmp_path, mode, name="picture.png"):
    Image.fromarray(colours()).convert(mode).save(tmp_path / name)
    return tmp_path / name


class TestFiles:
    def test_colour(self, tmp_path):
        found = read_file(written_as(tmp_path, "RGB"), None)
        assert torch.equal(found.pixels, torch.from_numpy(colours()))
        assert found.notes == ()

    @pytest.mark.parametrize(
        ("mode", "name", "channels"),
        [("L", "a.png", 1), ("1", "a.png", 1), ("P", "a.png", 3), ("CMYK", "a.jpg", 3), ("YCbCr", "a.jpg", 3)],
    )
    def test_other_modes(self, tmp_path, mode, name, channels):
        found = read_file(written_as(tmp_path, mode, name), None)
        assert found.pixels.shape == (20, 30, channels)
        assert found.pixels.dtype == torch.uint8

    def test_what_is_transparent_is_put_on_white(self, tmp_path):
        for mode, channels in (("RGBA", 3), ("LA", 1)):
            picture = Image.fromarray(colours()).convert(mode)
            alpha = np.zeros((20, 30), np.uint8)
            alpha[10:] = 255
            picture.putalpha(Image.fromarray(alpha))
            picture.save(tmp_path / "a.png")
            found = read_file(tmp_path / "a.png", None)
            assert found.pixels.shape == (20, 30, channels)
            assert (found.pixels[:10] == 255).all()
            assert not (found.pixels[10:] == 255).all()
            assert "white" in found.notes[0]

    def test_a_palette_with_a_transparent_colour(self, tmp_path):
        Image.fromarray(colours()).convert("P").save(tmp_path / "a.png", transparency=0)
        assert read_file(tmp_path / "a.png", None).pixels.shape == (20, 30, 3)

    def test_sixteen_bits_become_eight(self, tmp_path):
        values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        found = read_file(tmp_path / "a.png", None)
        assert found.notes == ("reduced to 8 bits",)
        assert found.pixels[0, 0, 0] == 0
        assert found.pixels[-1, -1, 0] == 255
        assert np.abs(found.pixels[:, :, 0].numpy() - values / 257).max() <= 0.5

    def test_floating_point_numbers(self, tmp_path):
        values = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
        Image.fromarray(values).save(tmp_path / "a.tiff")
        assert read_file(tmp_path / "a.tiff", None).pixels.max() == 255
        for bad in (values * 300, values * np.nan):
            Image.fromarray(bad).save(tmp_path / "b.tiff")
            with pytest.raises(UserError, match=r"grey values|NaN"):
                read_file(tmp_path / "b.tiff", None)

    def test_the_first_frame(self, tmp_path):
        frames = [Image.fromarray(colours() // (i + 1)) for i in range(3)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        found = read_file(tmp_path / "a.gif", None)
        assert "first of 3 frames" in found.notes[0]
        assert found.pixels.shape == (20, 30, 3)

    def test_a_camera_held_upright(self, tmp_path):
        picture = Image.fromarray(colours())
        about = picture.getexif()
        about[0x0112] = 6
        picture.save(tmp_path / "a.jpg", exif=about)
        assert read_file(tmp_path / "a.jpg", None).pixels.shape == (30, 20, 3)

    def test_a_large_one_is_reduced(self, tmp_path):
        found = read_file(written_as(tmp_path, "RGB"), 15)
        assert found.pixels.shape == (10, 15, 3)
        assert found.notes == ("reduced from 30 × 20 pixels",)
        assert read_file(written_as(tmp_path, "RGB"), 100).pixels.shape == (20, 30, 3), "and a small one stays"

    def test_what_cannot_be_read_is_said(self, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        (tmp_path / "empty.png").write_bytes(b"")
        whole = written_as(tmp_path, "RGB").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        for path, words in (
            (tmp_path, "folder"),
            (tmp_path / "missing.png", "does not exist"),
            (tmp_path / "text.png", "not a picture"),
            (tmp_path / "empty.png", "not a picture"),
            (tmp_path / "cut.png", "damaged"),
        ):
            with pytest.raises(UserError, match=words):
                read_file(path, None)

    def test_a_huge_one_is_not_decoded(self, tmp_path, monkeypatch):
        path = written_as(tmp_path, "RGB")
        monkeypatch.setattr(pictures, "MOST_PIXELS", 500)
        with pytest.raises(UserError, match="30 × 20 pixels"):
            read_file(path, 10)

    def test_a_bomb_is_refused(self, tmp_path, monkeypatch):
        path = written_as(tmp_path, "RGB")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match="too large"):
            read_file(path, 10)

    def test_a_tiny_one_is_refused(self, tmp_path):
        Image.fromarray(colours(4, 30)).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="30 × 4"):
            read_file(tmp_path / "a.png", None)

    def test_saving(self, tmp_path):
        for pixels in (torch.from_numpy(colours()), torch.from_numpy(colours())[:, :, :1].contiguous()):
            save(pixels, tmp_path / "out.png")
            assert torch.equal(read_file(tmp_path / "out.png", None).pixels, pixels)


class TestBundled:
    @pytest.mark.parametrize("name", BUNDLED)
    def test_it_is_inside_the_wheel(self, name):
        pytest.importorskip("skimage")
        found = bundled(name, 64)
        assert max(found.pixels.shape) == 64
        assert found.name == name

    def test_an_unknown_one(self):
        with pytest.raises(UserError, match="astronaut"):
            bundled("lena", 64)

    def test_text_is_dark_on_white(self):
        for number in range(4):
            found = bundled(f"text-{number}", 96).pixels
            assert found.shape == (96, 96, 1)
            assert 0.5 < (found > 200).float().mean() < 0.95
            assert found.min() < 60
        assert not torch.equal(written(0, 96), written(1, 96))


def small(tmp_path, **changes):
    base = generalization() if changes.get("held_out", "grid") != "none" else image()
    return replace(
        base,
        file=written_as(tmp_path, "RGB"),
        representation=Representation(width=8),
        optimization=replace(base.optimization, steps=4, validate_every=2),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


class TestRecipe:
    def test_splits_are_disjoint_quarters(self, tmp_path):
        for held_out in ("grid", "random"):
            config = small(tmp_path, held_out=held_out)
            found = parts(config, Grid(torch.zeros(20, 30, 3)))
            several = [found.training, found.validation, found.test]
            assert [len(part) for part in several] == [150, 150, 150]
            assert len(set(torch.cat(several).tolist())) == 450

    def test_the_split_is_the_seeds(self, tmp_path):
        config = small(tmp_path, held_out="random")
        grid = Grid(torch.zeros(20, 30, 3))
        assert torch.equal(parts(config, grid).training, parts(config, grid).training)
        other = replace(config, split_seed=1)
        assert not torch.equal(parts(config, grid).training, parts(other, grid).training)

    def test_frequencies_grow_with_the_picture(self, tmp_path):
        torch.manual_seed(0)
        coarse = build(small(tmp_path)).model.filters[0].phase.weight
        torch.manual_seed(0)
        fine = build(small(tmp_path, held_out="none")).model.filters[0].phase.weight
        torch.testing.assert_close(fine, 2 * coarse)

    @pytest.mark.parametrize("held_out", ["none", "grid"])
    def test_a_run_leaves_pictures(self, tmp_path, held_out):
        config = small(tmp_path, held_out=held_out, export_size=60)
        run = trained("implicit-image", config, tmp_path / "run")
        for name in ("original", "reconstruction", "error"):
            assert Image.open(run.path / "figures" / f"{name}.png").size == (30, 20)
        assert (run.path / "figures" / "given.png").exists() == (held_out == "grid")
        assert Image.open(run.path / "export.png").size == (60, 40)
        page = (run.path / "index.html").read_text()
        assert "reduced" not in page
        assert "30 × 20 pixels in colour" in page
        assert page.count("data:image/png") >= 4

    def test_a_finished_run_is_sampled_at_any_size(self, tmp_path, capsys):
        run = str(tmp_path / "run")
        words = ["--file", str(written_as(tmp_path, "RGB")), "--width", "8", "--steps", "2", "--device", "cpu"]
        assert cli.main(["train", "implicit-image", *words, "--output", run]) == 0
        for sizes, expected in ((["90"], (90, 60)), (["31", "70"], (70, 31))):
            assert cli.main(["evaluate", run, "--export-size", *sizes]) == 0
            assert Image.open(tmp_path / "run" / "export.png").size == expected
        assert not (tmp_path / "run" / "evaluation.json").exists()
        capsys.readouterr()
        for sizes in (["0"], ["1", "2", "3"], ["99999"]):
            assert cli.main(["evaluate", run, "--export-size", *sizes]) == 2
            assert "--export-size" in capsys.readouterr().err

    def test_the_command_line_says_what_is_wrong(self, tmp_path, capsys):
        (tmp_path / "text.png").write_text("no picture")
        complaints = [
            (["--file", str(tmp_path / "text.png")], "not a picture"),
            (["--file", str(tmp_path / "none.png")], "does not exist"),
            (["--picture", "lena"], "there is no picture"),
            (["--size", "99999"], "--size"),
            (["--export-size", "0"], "--export-size"),
            (["--gradient", "unrolled-phantom"], "--amortize"),
            (["--size", "10"], "too few pixels"),
        ]
        assert_refused(capsys, "implicit-image-generalization", tmp_path / "run", complaints)


def test_error_maps_go_from_dark_to_bright():
    truth = torch.zeros(2, 2, 3)
    values = truth.clone()
    values[0, 0] = 0.9
    shown = error_map(values, truth).sum(-1)
    assert shown[0, 0] > 500
    assert (shown.flatten()[1:] < 20).all()


def test_exports_keep_the_proportions():
    assert export_sizes((20, 30), 300) == (200, 300)
    assert export_sizes((512, 512), 64) == (64, 64)


def test_quantized():
    assert quantized(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


class TestMeasured:
    """Fields known by an operator, or by their slopes."""

    @pytest.mark.parametrize("operator", ["downsample", "mask"])
    def test_training(self, operator, tmp_path):
        config = small(tmp_path, held_out="none", operator=operator, size=16, noise=0.01)
        run = trained("implicit-image", config, tmp_path / "run")
        results = Results.of(run)
        assert results.test.figures["PSNR"] != results.best.figures["PSNR"], "the picture is the test's alone"
        page = (run.path / "index.html").read_text()
        assert "measurements that were held back" in page
        assert ("Bicubic" in page) == (operator == "downsample")

    @pytest.mark.parametrize("target", ["gradient", "laplacian"])
    @pytest.mark.parametrize("implicit", [True, False])
    def test_slopes_of_the_field_itself(self, target, implicit, tmp_path):
        config = small(tmp_path, held_out="none", target=target, size=12)
        exact = replace(config.equilibria, gradient="implicit", tolerance=1e-4, backward_tolerance=1e-4)
        model = Representation(width=8, implicit=implicit, amortize="solve", frequencies=2.0)
        task = build(replace(config, equilibria=exact, representation=model))
        grid = task.points.sizes
        measured = task.operator(task.image(task.all_values()))
        # the field's own slopes, as the loss has them, are nearly those of differences on a finer grid
        task.measured = torch.zeros_like(task.measured)
        index = torch.arange(len(task.points))
        index = index[(index // grid[1] > 0) & (index // grid[1] < grid[0] - 1)]
        index = index[(index % grid[1] > 0) & (index % grid[1] < grid[1] - 1)]
        loss = float(task._misfit(index)) * task.spread**2
        if target == "gradient":
            there = measured[0].flatten(1, 2)[:, index].square().mean()
        else:
            there = measured.square().mean()
        assert loss == pytest.approx(float(there), rel=0.35)
        task._misfit(index).backward()
        assert all(bool(p.grad.isfinite().all()) for p in task.parameters() if p.grad is not None)

    def test_a_gradient_tells_the_picture_up_to_a_constant(self, tmp_path):
        config = small(tmp_path, held_out="none", target="gradient", size=12)
        model = Representation(width=8, implicit=False)
        task = build(replace(config, representation=model))
        truth = task.truth()[0].flatten(1).T
        task.all_values = lambda: truth + 0.25
        assert task.figures(task.score(torch.arange(len(task.points))).tolist())["PSNR"] > 100

    def test_settings_that_do_not_go_together(self, tmp_path):
        with pytest.raises(UserError, match="give one of them"):
            replace(image(), operator="blur", target="gradient")
        with pytest.raises(UserError, match="leave --held-out none"):
            replace(generalization(), operator="blur")
        with pytest.raises(UserError, match="no exact second derivative"):
            build(small(tmp_path, held_out="none", target="gradient"))
        wide = Representation(width=2000, memory_mb=8, amortize="off", implicit=False)
        config = replace(small(tmp_path, held_out="none", operator="blur", size=32), file=None, representation=wide)
        with pytest.raises(UserError, match="all 1024 pixels at once"):
            build(config)
