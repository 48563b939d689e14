"""Sounds as fields, on sounds made here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from running import assert_refused, assert_resumes, trained
from scipy.io import wavfile

from torchimplicit import cli
from torchimplicit.recipes.representations import audio as sounds
from torchimplicit.recipes.representations.audio import (
    RUNNER,
    audio,
    build,
    quantized,
    read_file,
    save,
    sound,
    spectrograms,
    synthesized,
    waveforms,
)
from torchimplicit.recipes.representations.fit import Representation
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Machine
from torchimplicit.recipes.runtime.trainer import Results


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


def tone(rate=1000, seconds=1.0, pitch=40.0, peak=0.5):
    return peak * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def written(tmp_path, values, rate=1000, name="tone.wav"):
    wavfile.write(tmp_path / name, rate, values)
    return tmp_path / name


def read(path, start=0.0, seconds=None, rate=1000, mono=False):
    return read_file(path, start, seconds, rate, mono)


AS = {
    "u1": lambda x: (128 + 128 * x).round().clip(0, 255).astype(np.uint8),
    "i2": lambda x: (32768 * x).round().astype(np.int16),
    "i4": lambda x: (2**31 * x).round().astype(np.int32),
    "f4": lambda x: x.astype(np.float32),
    "f8": lambda x: x,
}


class TestFiles:
    @pytest.mark.parametrize("kind", AS)
    def test_every_number_format(self, tmp_path, kind):
        found = read(written(tmp_path, AS[kind](tone())))
        tolerance = {"u1": 2e-2, "i2": 2e-4}.get(kind, 1e-6)
        torch.testing.assert_close(
            found.samples[:, 0].double() * found.peak, torch.from_numpy(tone()), atol=tolerance, rtol=0
        )
        assert found.rate == 1000
        assert found.samples.abs().max() == 1
        assert found.notes == ()

    def test_three_bytes(self, tmp_path):
        values = (2**23 * tone()).round().astype("<i4")
        data = values.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
        head = b"WAVEfmt " + (16).to_bytes(4, "little") + (1).to_bytes(2, "little") + (1).to_bytes(2, "little")
        head += (1000).to_bytes(4, "little") + (3000).to_bytes(4, "little") + (3).to_bytes(2, "little")
        head += (24).to_bytes(2, "little") + b"data" + len(data).to_bytes(4, "little")
        (tmp_path / "a.wav").write_bytes(b"RIFF" + (len(head) + len(data)).to_bytes(4, "little") + head + data)
        found = read(tmp_path / "a.wav")
        torch.testing.assert_close(
            found.samples[:, 0] * found.peak, torch.from_numpy(tone()).float(), atol=1e-6, rtol=0
        )

    def test_two_channels_stay_or_are_averaged(self, tmp_path):
        both = np.stack([tone(), 0.5 * tone(pitch=70)], 1)
        path = written(tmp_path, AS["f4"](both))
        found = read(path)
        torch.testing.assert_close(found.samples.numpy() * found.peak, AS["f4"](both))
        found = read(path, mono=True)
        assert found.samples.shape == (1000, 1)
        torch.testing.assert_close(found.samples[:, 0].numpy() * found.peak, AS["f4"](both.mean(1)))
        assert "mean of 2 channels" in found.notes[0]

    def test_many_channels_are_refused_unless_averaged(self, tmp_path):
        path = written(tmp_path, AS["i2"](np.stack([tone()] * 9, 1)))
        with pytest.raises(UserError, match="--mono"):
            read(path)
        assert read(path, mono=True).samples.shape == (1000, 1)

    def test_an_excerpt(self, tmp_path):
        path = written(tmp_path, AS["f8"](tone(seconds=2)))
        found = read(path, start=0.5, seconds=0.25)
        torch.testing.assert_close(found.samples[:, 0].numpy() * found.peak, AS["f4"](tone(seconds=2)[500:750]))
        assert "0.5 s to 0.75 s of 2 s" in found.notes[0]
        assert len(read(path, start=1.5, seconds=9).samples) == 500

    def test_a_high_rate_is_reduced(self, tmp_path):
        path = written(tmp_path, AS["f8"](tone(rate=44100, seconds=0.5)), rate=44100)
        found = read(path, rate=8000)
        assert found.rate == 8000
        assert found.samples.shape == (4000, 1)
        inner = slice(100, -100)
        torch.testing.assert_close(
            found.samples[inner, 0].double() * found.peak,
            torch.from_numpy(tone(rate=8000, seconds=0.5))[inner],
            atol=2e-3,
            rtol=0,
        )
        low = read(written(tmp_path, AS["f8"](tone())), rate=8000)
        assert low.rate == 1000, "a low one stays"

    def test_what_cannot_be_read_is_said(self, tmp_path):
        whole = written(tmp_path, AS["i2"](tone())).read_bytes()
        files = {
            "text.wav": b"no sound at all",
            "empty.wav": b"",
            "head.wav": whole[:30],
            "song.mp3": b"ID3\x03\x00" + bytes(100),
            "song.m4a": bytes(4) + b"ftypM4A " + bytes(100),
        }
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        written(tmp_path, np.zeros(0, np.int16), name="nothing.wav")
        written(tmp_path, np.zeros(500, np.int16), name="silent.wav")
        written(tmp_path, np.full(500, np.nan, np.float32), name="nan.wav")
        written(tmp_path, AS["i2"](tone(seconds=0.02)), name="short.wav")
        for name, words in (
            ("", "folder"),
            ("missing.wav", "does not exist"),
            ("text.wav", "no sound file"),
            ("empty.wav", "no sound file"),
            ("head.wav", "damaged"),
            ("song.mp3", "damaged.*ffmpeg"),
            ("song.m4a", "no sound file"),
            ("nothing.wav", "no samples"),
            ("silent.wav", "silent"),
            ("nan.wav", "NaN"),
            ("short.wav", "20 samples"),
        ):
            with pytest.raises(UserError, match=words):
                read(tmp_path / name)
        with pytest.raises(UserError, match="past the end"):
            read(tmp_path / "tone.wav", start=5)

    def test_one_that_is_cut_short_is_taken_as_far_as_it_goes(self, tmp_path):
        whole = written(tmp_path, AS["i2"](tone())).read_bytes()
        (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
        found = read(tmp_path / "cut.wav")
        assert 400 < len(found.samples) < 500
        assert "cut short" in found.notes[0]

    def test_a_long_one_is_refused_and_a_part_of_it_taken(self, tmp_path, monkeypatch):
        path = written(tmp_path, AS["i2"](tone(seconds=5)))
        monkeypatch.setattr(sounds, "MOST_SAMPLES", 2000)
        with pytest.raises(UserError, match="--seconds"):
            read(path)
        assert len(read(path, seconds=2).samples) == 2000
        assert len(read(path, rate=400).samples) == 2000

    def test_one_above_full_scale(self, tmp_path):
        found = read(written(tmp_path, AS["f4"](tone(peak=3.0))))
        assert found.peak == 1
        assert "full scale" in found.notes[0]

    def test_saving(self, tmp_path):
        samples = quantized(torch.tensor([[-2.0, 0.5], [1.0, -0.5]]))
        save(samples, 500, tmp_path / "a.wav")
        rate, found = wavfile.read(tmp_path / "a.wav")
        assert rate == 500
        assert found.tolist() == [[-32767, 16384], [32767, -16384]]


class TestSynthesis:
    @pytest.mark.parametrize("name", ["melody", "vowels"])
    @pytest.mark.parametrize("rate", [2000, 8000])
    def test_it_is_a_sound(self, name, rate):
        made = synthesized(name, 1.5, rate)
        assert made.shape == (1.5 * rate,)
        assert np.abs(made).max() == 1
        power = np.abs(np.fft.rfft(made)) ** 2
        assert power[: len(power) // 10].sum() < 0.99 * power.sum(), "it has overtones"
        assert sound(replace(audio(), sound=name)).name == f"synthesized {name}"


def test_what_is_lost_of_the_high_frequencies_is_told():
    low, high = (
        torch.from_numpy(tone(8000, 1.0, pitch, peak))[:, None] for pitch, peak in ((300.0, 0.5), (3000.0, 0.02))
    )
    truth = low + high
    assert 10 * torch.log10(truth.square().mean() / high.square().mean()) > 27, "hardly anything beside the whole"
    assert sounds.spectral_distance(truth, truth, 8000) == 0
    assert sounds.spectral_distance(truth, low, 8000) > 1
    lost = sounds.octaves(truth, low, 8000)
    assert lost["2000 to 4000 Hz"] == pytest.approx(0, abs=0.01)
    assert lost["0 to 500 Hz"] > 100


def small(tmp_path, **changes):
    both = np.stack([tone(), tone(pitch=70)], 1)
    return replace(
        audio(),
        file=written(tmp_path, AS["i2"](both)),
        representation=Representation(width=8),
        optimization=replace(audio().optimization, steps=4, validate_every=2),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


class TestRecipe:
    def test_frequencies_grow_with_the_samples(self, tmp_path):
        def scale(seconds, rate):
            torch.manual_seed(0)
            config = replace(small(tmp_path), file=None, seconds=seconds, rate=rate)
            return build(config).model.filters[0].phase.weight

        torch.testing.assert_close(scale(2.0, 1000), 2 * scale(1.0, 1000))
        torch.testing.assert_close(scale(1.0, 1000), 2 * scale(1.0, 500))

    def test_a_run_leaves_sounds_and_pictures(self, tmp_path):
        run = trained("implicit-audio", small(tmp_path, export_size=2500), tmp_path / "run")
        for name, rate in (("original", 1000), ("reconstruction", 1000), ("error", 1000), ("export", 2500)):
            found, values = wavfile.read(run.path / f"{name}.wav")
            assert (found, values.shape) == (rate, (rate, 2))
        _, first = wavfile.read(run.path / "original.wav")
        assert np.abs(first).max() == pytest.approx(16384, abs=2), "as loud as the file"
        for name in ("waveform", "spectrogram", "curve"):
            assert (run.path / "figures" / f"{name}.png").is_file()
        page = (run.path / "index.html").read_text()
        assert "1000 samples in 2 channels" in page
        figures = run.read_json("sound.json")
        assert f"log-spectral distance is {figures['spectral_distance']:.2f} dB" in page
        assert list(figures["octaves"]) == ["250 to 500 Hz", "125 to 250 Hz", "62 to 125 Hz", "0 to 62 Hz"]
        assert page.count("<audio") == 4
        (run.path / "mine.wav").write_bytes(b"")
        test = Results.of(run).test.figures
        assert test["PSNR"] - test["SNR"] == pytest.approx(10 * np.log10(4 / 0.5), abs=0.05)
        create("implicit-audio", RunOptions(output=run.path, overwrite=True))
        assert [one.name for one in run.path.glob("*.wav")] == ["mine.wav"]

    def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(self, tmp_path):
        assert_resumes("implicit-audio", small(tmp_path), tmp_path)

    def test_in_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torchimplicit.recipes.representations.fit.chunk_points", lambda *_: 300)
        run = trained("implicit-audio", small(tmp_path), tmp_path / "run")
        assert np.isfinite(Results.of(run).test.figures["PSNR"])

    def test_states_without_room_are_refused_before_training(self, tmp_path):
        config = small(tmp_path)
        config = replace(
            config, representation=Representation(width=4096, memory_mb=16), file=None, seconds=1.0, rate=8000
        )
        with pytest.raises(UserError, match="--memory-mb"):
            RUNNER.check(config)

    def test_the_command_line(self, tmp_path, capsys):
        (tmp_path / "song.mp3").write_bytes(b"ID3" + bytes(50))
        complaints = [
            (["--file", str(tmp_path / "song.mp3")], "cannot be read"),
            (["--file", str(tmp_path / "none.wav")], "does not exist"),
            (["--rate", "1"], "--rate"),
            (["--seconds", "0"], "--seconds"),
            (["--seconds", "None"], "--file"),
            (["--start", "-1"], "--start"),
            (["--seconds", "99999"], "fewer --seconds"),
            (["--sound", "birds"], "birds"),
        ]
        assert_refused(capsys, "implicit-audio", tmp_path / "run", complaints)

    def test_a_finished_run_is_sampled_at_any_rate(self, tmp_path, capsys):
        run = str(tmp_path / "run")
        words = ["--seconds", "0.5", "--rate", "500", "--width", "8", "--steps", "2", "--device", "cpu"]
        assert cli.main(["train", "implicit-audio", *words, "--output", run]) == 0
        assert cli.main(["evaluate", run, "--export-size", "3000"]) == 0
        rate, values = wavfile.read(tmp_path / "run" / "export.wav")
        assert (rate, values.shape) == (3000, (1500,))
        capsys.readouterr()
        for sizes in (["7"], ["100", "200"], ["999999"]):
            assert cli.main(["evaluate", run, "--export-size", *sizes]) == 2
            assert "--export-size" in capsys.readouterr().err


@pytest.mark.parametrize("count", [64, 300, 9000])
def test_figures_of_any_length(count):
    truth = torch.randn(count, 1)
    assert len(waveforms(truth, 0.9 * truth, 8000).axes) == 2
    assert len(spectrograms({"sound": truth, "silence": torch.zeros_like(truth)}, 8000).axes) == 3
