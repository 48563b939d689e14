"""Pictures restored by a decoder's prior, and decoders of a person's own pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")
pytest.importorskip("sklearn")

from PIL import Image
from running import trained

import torchimplicit as ti
from torchimplicit import cli
from torchimplicit.models import conv_decoder
from torchimplicit.recipes.joint.decoder import Images, Joint, fitted, in_folder, read
from torchimplicit.recipes.joint.generation import OWN, generation_images
from torchimplicit.recipes.joint.restore import _picture, norm, restored
from torchimplicit.recipes.operators import Blur, Downsample, Known
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine, Optimization

PIXELS = (1, 9, 7)
JOINT = Joint(test_steps=400, joint_tolerance=1e-6, prior=1e-7)


@pytest.mark.parametrize(
    "operator",
    [
        lambda images: images,
        Known.drawn(0.6, 9, 7),
        SimpleNamespace(A=lambda images: 5 * Blur(0.7)(images), A_adjoint=None),
    ],
    ids=["noise", "mask", "foreign"],
)
def test_what_a_decoder_made_is_found_again(operator) -> None:
    torch.manual_seed(0)
    decoder = conv_decoder(PIXELS, latent=3, channels=4, solver=ti.Anderson(rtol=1e-7, max_steps=100)).eval()
    decoder.requires_grad_(False)
    with torch.no_grad():
        decoder.head[0].bias.fill_(0.5)
        clean = decoder(0.5 * torch.randn(3, 3))
        measured = getattr(operator, "A", operator)(clean)
    result = restored(decoder, measured, operator, JOINT, PIXELS)
    assert float((result.images - clean.clamp(0, 1)).abs().max()) < 0.02
    with pytest.raises(UserError, match="what was measured is"):
        restored(decoder, measured[..., :2], operator, JOINT, PIXELS)
    with pytest.raises(UserError, match="neither"):
        restored(decoder, measured, 3, JOINT, PIXELS)


def test_the_norm_of_an_operator() -> None:
    like = torch.zeros(1, 1, 8, 8).double()
    assert norm(lambda x: 3 * x, like) == pytest.approx(3)
    assert norm(Downsample(2), like) == pytest.approx(0.5, rel=1e-3)


def pictures(folder: Path, count: int = 8, size: tuple[int, int] = (9, 11)) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(generator.integers(0, 255, size[::-1]).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_pictures_of_a_folder(tmp_path) -> None:
    folder = pictures(tmp_path / "own")
    assert in_folder(folder, None).images.shape == (8, 1, 11, 9)
    data = read(Images(images=folder, validation_images=2))
    assert [len(part.images) for part in data] == [5, 2, 1]
    Image.new("RGB", (30, 20)).save(folder / "wide.png")
    with pytest.raises(UserError, match="give --image-size HEIGHT WIDTH"):
        in_folder(folder, None)
    assert in_folder(folder, (6, 5)).images.shape == (9, 3, 6, 5)
    with pytest.raises(UserError, match="training needs more"):
        in_folder(tmp_path, None)
    with pytest.raises(UserError, match="is not a folder"):
        in_folder(tmp_path / "nothing", None)
    with pytest.raises(UserError, match="add --images FOLDER"):
        OWN.ready(generation_images())
    with pytest.raises(UserError, match="--image-size is for"):
        Images(image_size=(3, 3))


def test_pictures_of_16_bits_and_turned_ones(tmp_path) -> None:
    deep, turned = tmp_path / "deep.png", tmp_path / "turned.png"
    Image.fromarray((257 * np.arange(48).reshape(6, 8)).astype(np.uint16)).save(deep)
    assert torch.equal((255 * _picture(deep, 1, (6, 8))).round().flatten(), torch.arange(48.0))
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.new("L", (8, 6)).save(turned, exif=exif)
    assert _picture(turned, 3, (8, 6)).shape == (3, 8, 6)


def test_cutting_to_a_shape() -> None:
    ramp = torch.arange(12, dtype=torch.uint8).expand(1, 6, 12)
    assert torch.equal(fitted(ramp, (6, 4))[0, 0], torch.tensor([4, 5, 6, 7], dtype=torch.uint8))
    assert fitted(ramp, (3, 3)).shape == (1, 3, 3)


def test_the_command(tmp_path, capsys) -> None:
    base = generation_images()
    config = replace(
        base,
        images=Images(images=pictures(tmp_path / "own"), validation_images=2),
        decoder=replace(base.decoder, latent=2, channels=2),
        joint=Joint(joint_steps=3, test_steps=3),
        components=2,
        optimization=Optimization(steps=1, batch_size=4, validate_every=1),
        machine=Machine(device="cpu", tensorboard=False),
    )
    run = trained("jiio-generation-images", config, tmp_path / "run")
    assert (run.path / "pictures.png").is_file()
    file = str(tmp_path / "own" / "0.png")
    for operator in ("noise", "blur", "downsample"):
        assert cli.main(["restore", str(run.path), file, "--operator", operator, "--simulate", "--steps", "2"]) == 0
        assert "PSNR to the clean picture" in capsys.readouterr().out
    with Image.open(tmp_path / "own" / "0-restored.png") as made:
        assert made.size == (9, 11)
    matrix, measured = tmp_path / "matrix.npy", tmp_path / "measured.npy"
    np.save(matrix, np.eye(99)[:40])
    np.save(measured, np.full(40, 0.5))
    assert cli.main(["restore", str(run.path), str(measured), "--operator", str(matrix), "--steps", "2"]) == 0
    assert cli.main(["restore", str(run.path), file, "--operator", file, "--steps", "2"]) == 0
    capsys.readouterr()
    for arguments, words in (
        ((file, "--operator", "mask"), "no transparent pixels"),
        ((file, "--operator", "fog"), "none of blur, mask"),
        (("none.png",), "does not exist"),
        ((str(measured), "--operator", file), "what was measured is"),
        ((file, "--operator-size", "-1", "--operator", "blur"), "must be positive"),
        ((file, "--simulate", "--noise", "-1"), "--noise"),
        ((file, "--noise", "0.1"), "for --simulate alone"),
        ((file, "--output", str(tmp_path / "no" / "x.png")), "not a folder"),
    ):
        assert cli.main(["restore", str(run.path), *arguments]) == 2
        assert words in capsys.readouterr().err
