"""Shapes as fields, on meshes made here: a ball and a box, whose distances are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")
pytest.importorskip("skimage")
pytest.importorskip("trimesh")

import trimesh
from PIL import Image
from rich.console import Console
from running import assert_refused, assert_resumes, descent, trained

from torchimplicit.recipes.representations.cloud import read_cloud
from torchimplicit.recipes.representations.fit import Representation, floats_a_point
from torchimplicit.recipes.representations.mesh import (
    KINDS,
    MADE,
    Edges,
    Mesh,
    MeshTree,
    drawn,
    extracted,
    made,
    nearest_on_triangles,
    prepared,
    read_file,
    sample,
    section,
    solid_angles,
    view,
    write_obj,
    write_ply,
)
from torchimplicit.recipes.representations.shape import (
    LONGEST,
    RUNNER,
    Counts,
    DistanceLoss,
    Frame,
    Overlap,
    _upright,
    adam,
    build,
    compared,
    shape,
)
from torchimplicit.recipes.representations.shape import drawn as points_of
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine
from torchimplicit.recipes.runtime.step_cost import peak_bytes
from torchimplicit.recipes.runtime.trainer import Results


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


def plain(mesh):
    return Mesh(torch.from_numpy(np.array(mesh.vertices, dtype=np.float64)), torch.from_numpy(np.array(mesh.faces)))


def ball(finer=2):
    return plain(trimesh.creation.icosphere(subdivisions=finer))


def box():
    """From -1, -0.5, -0.25 to 1, 0.5, 0.25."""
    return plain(trimesh.creation.box(extents=(2.0, 1.0, 0.5)))


def box_distance(x):
    """In closed form."""
    q = x.abs() - torch.tensor([1.0, 0.5, 0.25], dtype=x.dtype)
    return q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0)


def places(count=500, reach=2.0):
    return reach * (2 * torch.rand(count, 3, dtype=torch.float64) - 1)


class TestMesh:
    def test_volume_and_area(self):
        assert box().volume == pytest.approx(1.0)
        assert box().area == pytest.approx(7.0)
        assert ball(4).volume == pytest.approx(4 / 3 * math.pi, rel=1e-2)

    def test_samples_are_on_the_surface_and_even(self):
        mesh = box()
        found = sample(mesh, 20000, torch.Generator().manual_seed(0))
        assert box_distance(found.points).abs().max() < 1e-12
        top = (found.points[:, 2] - 0.25).abs() < 1e-12
        assert float(top.double().mean()) == pytest.approx(2 / 7, abs=0.01)
        assert found.points[top, 0].mean().abs() < 0.03

    def test_normals_point_outward(self):
        mesh = ball()
        torch.testing.assert_close(mesh.vertex_normals(), mesh.vertices, atol=0.03, rtol=0)
        assert (mesh.normals() * mesh.corners.mean(1)).sum(1).min() > 0.9

    @pytest.mark.parametrize("axis", range(3))
    def test_a_ball_is_cut_in_a_circle(self, axis):
        found = section(Mesh(ball(3).vertices + 1e-3, ball(3).faces), axis)
        assert found[:, :, axis].abs().max() < 1e-12
        assert found.norm(dim=2).sub(1).abs().max() < 0.02
        assert (found[:, 1] - found[:, 0]).norm(dim=1).sum() == pytest.approx(2 * math.pi, rel=0.01)

    def test_edges(self):
        whole = ball()
        assert Edges.of(whole) == Edges(0, 0, 0)
        opened = Edges.of(replace(whole, faces=whole.faces[1:]))
        assert (opened.open, opened.crowded, opened.turned) == (3, 0, 0)
        turned = whole.faces.clone()
        turned[0] = turned[0].flip(0)
        assert Edges.of(replace(whole, faces=turned)).turned == 3


class TestPrepared:
    def test_a_good_one_stays(self):
        mesh, notes = prepared(ball(), "ball")
        assert notes == ()
        assert mesh.volume == pytest.approx(ball().volume)

    def test_vertices_that_are_one_are_joined(self):
        whole = ball()
        soup = Mesh(whole.corners.reshape(-1, 3), torch.arange(3 * len(whole.faces)).reshape(-1, 3))
        mesh, notes = prepared(soup, "soup")
        assert len(mesh.vertices) == len(whole.vertices)
        assert notes == ()

    def test_inside_out(self):
        mesh, notes = prepared(replace(ball(), faces=ball().faces.flip(1)), "ball")
        assert mesh.volume > 0
        assert "negative" in notes[0]

    def test_faces_that_are_turned_against_each_other(self):
        faces = ball().faces.clone()
        faces[::3] = faces[::3].flip(1)
        mesh, notes = prepared(replace(ball(), faces=faces), "ball")
        assert "turned to agree" in notes[0]
        assert mesh.volume == pytest.approx(ball().volume)

    def test_a_hole_is_said(self):
        mesh, notes = prepared(replace(ball(), faces=ball().faces[5:]), "ball")
        assert "not watertight" in notes[0]
        assert "winding number" in notes[0]
        assert MeshTree(mesh).winding(torch.zeros(1, 3, dtype=torch.float64)) > 0.9

    def test_faces_without_area(self):
        whole = ball()
        faces = torch.cat([whole.faces, torch.tensor([[0, 0, 1], [3, 3, 3]])])
        mesh, notes = prepared(replace(whole, faces=faces), "ball")
        assert len(mesh.faces) == len(whole.faces)
        assert "2 faces" in notes[0]

    def test_what_is_no_surface_is_refused(self):
        whole = ball()
        bad = whole.vertices.clone()
        bad[3, 1] = math.nan
        for mesh, words in (
            (replace(whole, vertices=bad), "NaN"),
            (replace(whole, faces=whole.faces[:0]), "no faces"),
            (replace(whole, vertices=0 * whole.vertices), "no faces with an area"),
            (replace(whole, faces=whole.faces + 5), "not there"),
        ):
            with pytest.raises(UserError, match=words):
                prepared(mesh, "it")


class TestTree:
    @pytest.mark.parametrize("mesh", [box(), ball()], ids=["box", "ball"])
    def test_winding_numbers_of_closed_surfaces(self, mesh):
        x = places()
        found = MeshTree(mesh).winding(x)
        exact = solid_angles(mesh.corners[None] - x[:, None, None]).sum(1) / (4 * math.pi)
        assert ((exact - exact.round()).abs() < 1e-9).all()
        assert (found - exact).abs().max() < 0.15
        assert torch.equal(found > 0.5, exact > 0.5)

    def test_the_inside_is_that_of_the_formula(self):
        x = places(2000, 1.2)
        assert torch.equal(MeshTree(box()).winding(x) > 0.5, box_distance(x) < 0)

    def test_half_of_a_sphere_winds_half_around_its_middle(self):
        whole = ball(4)
        upper = Mesh(whole.vertices, whole.faces[whole.corners.mean(1)[:, 2] > 0])
        assert MeshTree(upper).winding(torch.zeros(1, 3, dtype=torch.float64)).item() == pytest.approx(0.5, abs=0.02)

    def test_distances_to_a_box_are_those_of_the_formula(self):
        x = places(2000)
        torch.testing.assert_close(MeshTree(box()).signed_distance(x), box_distance(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("finer", [0, 1, 3])
    def test_distances_to_a_ball_are_those_of_all_its_triangles(self, finer):
        mesh = ball(finer)
        x = torch.cat([places(300), mesh.vertices[:20], mesh.corners.mean(1)[:20], torch.zeros(1, 3).double()])
        distance, nearest, face = MeshTree(mesh).closest(x)
        away = (nearest_on_triangles(x[:, None], mesh.corners[None]) - x[:, None]).norm(dim=-1)
        torch.testing.assert_close(distance, away.amin(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((nearest - x).norm(dim=1), distance, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(away.gather(1, face[:, None]).squeeze(1), distance, rtol=1e-9, atol=1e-12)

    def test_a_single_triangle(self):
        mesh = Mesh(torch.eye(3, dtype=torch.float64), torch.tensor([[0, 1, 2]]))
        distance, nearest, _ = MeshTree(mesh).closest(torch.tensor([[1.0, 1, 1], [2, 0, 0], [0.5, 0.5, -1]]).double())
        torch.testing.assert_close(distance, torch.tensor([2 / 3**0.5, 1.0, 1.0]).double())
        torch.testing.assert_close(nearest[0], torch.full((3,), 1 / 3).double())


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_kinds(self, tmp_path, kind):
        trimesh.creation.icosphere(subdivisions=2).export(tmp_path / f"ball{kind}")
        mesh, notes = prepared(read_file(tmp_path / f"ball{kind}", 10**6), "ball")
        assert notes == ()
        assert len(mesh.vertices) == 162
        assert mesh.volume == pytest.approx(ball().volume, rel=1e-5)

    @pytest.mark.parametrize("write", [write_obj, write_ply])
    def test_what_is_written_is_read_again(self, tmp_path, write):
        mesh = ball()
        write(mesh, tmp_path / f"it{'.obj' if write is write_obj else '.ply'}")
        again = read_file(next(tmp_path.iterdir()), 10**6)
        torch.testing.assert_close(again.vertices, mesh.vertices, rtol=1e-6, atol=1e-6)
        assert torch.equal(again.faces, mesh.faces)

    def test_polygons_become_triangles(self, tmp_path):
        (tmp_path / "it.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
        assert len(read_file(tmp_path / "it.obj", 100).faces) == 2

    def test_what_cannot_be_read_is_said(self, tmp_path):
        (tmp_path / "text.ply").write_text("no mesh")
        (tmp_path / "empty.stl").write_bytes(b"")
        (tmp_path / "cloud.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
        (tmp_path / "photo.png").write_bytes(b"123")
        trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "ball.ply")
        whole = (tmp_path / "ball.ply").read_bytes()
        (tmp_path / "cut.ply").write_bytes(whole[: len(whole) // 2])
        for name, most, words in (
            ("", 10**6, "folder"),
            ("missing.obj", 10**6, "does not exist"),
            ("text.ply", 10**6, "cannot be read"),
            ("empty.stl", 10**6, "cannot be read|no faces"),
            ("cloud.obj", 10**6, "no faces|cannot be read"),
            ("photo.png", 10**6, "not a mesh file"),
            ("cut.ply", 10**6, "cannot be read|no faces"),
            ("ball.ply", 300, "--most-faces 320"),
            ("ball.ply", 3, "MB"),
        ):
            with pytest.raises(UserError, match=words):
                prepared(read_file(tmp_path / name, most), name)


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_is_watertight(name):
    mesh, notes = prepared(made(name), name)
    assert notes == ()
    assert mesh.volume > 0


class TestPoints:
    def test_values_are_those_of_the_box(self):
        mesh = Frame.of(box()).inward(box())
        points, parts = points_of(mesh, MeshTree(mesh), "sdf", Counts(900, 200), 0)
        x, y = points.at(torch.arange(len(points)))
        expected = box_distance(x.double() / 0.9) * 0.9
        torch.testing.assert_close(y[:, 0].double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(y[:, 1:4].norm(dim=1), torch.ones(len(points)))
        step = x.double() + 1e-4 * y[:, 1:4].double()
        ahead = box_distance(step / 0.9) * 0.9
        assert ((ahead - expected) / 1e-4).median() == pytest.approx(1.0, abs=1e-3)
        assert [len(part) for part in (parts.training, parts.validation, parts.test)] == [900, 200, 200]
        assert (y[parts.training, 0] == 0).sum() == 300
        assert (y[parts.test, 4] == 1).sum() == 100
        assert (x.abs() <= torch.tensor(points.corner) + 1e-6).all()

    def test_occupancy_is_the_sign_of_the_distance(self):
        mesh = Frame.of(ball()).inward(ball())
        points, _ = points_of(mesh, MeshTree(mesh), "occupancy", Counts(400, 100), 3)
        x, y = points.at(torch.arange(600))
        assert torch.equal(y[:, 0] > 0.5, MeshTree(mesh).signed_distance(x.double()) < 0)
        again, _ = points_of(mesh, MeshTree(mesh), "occupancy", Counts(400, 100), 3)
        other, _ = points_of(mesh, MeshTree(mesh), "occupancy", Counts(400, 100), 4)
        assert torch.equal(again.coordinates, points.coordinates)
        assert not torch.equal(other.coordinates, points.coordinates)

    def test_a_sheet_has_no_inside(self):
        sheet = Mesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0.1]]).double(), torch.tensor([[0, 1, 2]]))
        mesh, _ = prepared(sheet, "sheet")
        with pytest.raises(UserError, match="nothing is inside"):
            points_of(mesh, MeshTree(mesh), "occupancy", Counts(200, 100), 0)

    def test_frames_lead_back(self):
        mesh = Mesh(3 * box().vertices + 7, box().faces)
        frame = Frame.of(mesh)
        inward = frame.inward(mesh)
        assert float(inward.vertices.abs().max()) == pytest.approx(LONGEST / 2)
        torch.testing.assert_close(frame.outward(inward).vertices, mesh.vertices)


class TestSurface:
    @pytest.mark.parametrize("memory_mb", [1, 100])
    def test_a_ball_comes_back(self, memory_mb):
        found = extracted(lambda x: 0.7 - x.norm(dim=1), (1.0, 0.9, 0.8), 40, memory_mb)
        assert Edges.of(found) == Edges(0, 0, 0)
        assert found.vertices.norm(dim=1).sub(0.7).abs().max() < 2e-3
        assert found.volume == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=0.01)

    def test_slabs_make_no_difference(self):
        def knobbly(x):
            return 0.6 + 0.2 * (5 * x).sin().prod(1) - x.norm(dim=1)

        one, several = (extracted(knobbly, (1.0, 1.0, 1.0), 48, memory) for memory in (1, 1000))
        assert Edges.of(one) == Edges(0, 0, 0)
        assert (len(one.vertices), len(one.faces)) == (len(several.vertices), len(several.faces))
        assert one.volume == pytest.approx(several.volume, rel=1e-7)

    def test_what_goes_over_the_border_ends_there(self):
        found = extracted(lambda x: 1.2 - x.norm(dim=1), (1.0, 1.0, 1.0), 24, 100)
        assert Edges.of(found).open == 0
        assert float(found.vertices.abs().max()) <= 1

    @pytest.mark.parametrize("value", [-1.0, 0.0])
    def test_no_surface(self, value):
        assert extracted(lambda x: x.new_full((len(x),), value), (1.0, 1.0, 1.0), 16, 100) is None


class TestComparison:
    def test_of_itself(self):
        mesh = ball()
        found = compared(mesh, mesh, MeshTree(mesh))
        assert found.chamfer < 1e-12
        assert found.normals == pytest.approx(1)
        assert found.watertight
        assert found.volume == pytest.approx(1)

    def test_of_a_larger_ball(self):
        truth, other = ball(4), Mesh(1.1 * ball(4).vertices, ball(4).faces)
        found = compared(other, truth, MeshTree(truth))
        assert found.to_truth * LONGEST == pytest.approx(0.1, rel=0.01)
        assert found.from_truth * LONGEST == pytest.approx(0.1, rel=0.02)
        assert found.volume == pytest.approx(1.331)
        assert found.normals > 0.99


class TestPictures:
    def test_a_ball_is_a_disc(self):
        shown = drawn(ball(4), 50, view())
        dark = (shown.float().mean(-1) < 250).double()
        assert float(dark.mean()) == pytest.approx(math.pi / 2.5**2, rel=0.03)
        assert dark[25, 25] == 1
        assert dark[0, 0] == 0

    def test_what_is_in_front_is_seen(self):
        eye = torch.eye(3, dtype=torch.float64)
        behind = Mesh(0.8 * ball(3).vertices - torch.tensor([0, 0, 1.0]), ball(3).faces)
        front = Mesh(0.3 * ball(3).vertices + torch.tensor([0, 0, 1.0]), ball(3).faces)
        both = Mesh(torch.cat([front.vertices, behind.vertices]), torch.cat([front.faces, behind.faces + 642]))
        colours = torch.zeros(1284, 3, dtype=torch.float64)
        colours[:642, 0] = 1
        colours[642:, 2] = 1
        shown = drawn(both, 60, eye, colours)
        assert shown[30, 30, 0] > 100
        assert shown[30, 30, 2] == 0
        assert shown[30, 44, 2] > 50

    def test_up_is_up(self):
        high = Mesh(0.2 * ball().vertices + torch.tensor([0, 1.0, 0]), ball().faces)
        dark = drawn(high, 40, view()).float().mean(-1) < 250
        assert dark[:15].any()
        assert not dark[20:].any()

    def test_nothing(self):
        assert (drawn(None, 8, view()) == 255).all()


class TestCriteria:
    def test_the_true_distance_has_no_loss(self):
        mesh = Frame.of(box()).inward(box())
        points, parts = points_of(mesh, MeshTree(mesh), "sdf", Counts(600, 100), 0)
        x, y = points.at(parts.training)
        loss = DistanceLoss(distance=1.0, normal=1.0, eikonal=1.0)

        def field(x):
            return 0.9 * box_distance(x / 0.9)[:, None]

        assert loss(field, x, y).item() < 0.03, "but on edges, where slopes jump"
        assert loss(lambda x: 1.5 * field(x), x, y).item() > 0.2
        assert loss(lambda x: -field(x), x, y).item() > 0.5

    def test_with_the_surface_alone_values_elsewhere_keep_away_from_zero(self):
        x, y = torch.zeros(4, 3), torch.zeros(4, 5)
        y[:, 0] = torch.tensor([0.0, 0.0, 0.3, -0.3])
        y[:, 1] = 1
        loss = DistanceLoss(distance=1.0, normal=0.0, eikonal=0.0, surface_only=True)
        zero = loss(lambda x: x[:, :1], x.clone(), y)
        assert zero.item() == pytest.approx(0.5 / 30)
        assert loss(lambda x: x[:, :1] + 0.2, x.clone(), y).item() == pytest.approx(0.1, rel=1e-3)

    def test_overlap(self):
        y = torch.tensor([[1.0, 0], [1, 0], [0, 0], [0, 0], [1, 1], [0, 1]])
        values = torch.tensor([[2.0], [-2], [2], [-2], [2], [2]])
        score = Overlap(distance=False)
        figures = score.figures(score.sums(values, y).tolist())
        assert figures["IoU"] == pytest.approx(1 / 3)
        assert figures["IoU near"] == pytest.approx(1 / 2)
        distances = torch.tensor([[-1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 1]])
        score = Overlap(distance=True)
        figures = score.figures(score.sums(torch.tensor([[-0.5], [0.5]]), distances).tolist())
        assert figures == {"IoU": 1.0, "IoU near": 0.0, "loss": 0.5}


def small(tmp_path, **changes):
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "ball.ply")
    base = shape()
    optimization = replace(adam(4, 2), batch_size=changes.pop("batch_size", 200))
    settings = {
        "file": tmp_path / "ball.ply",
        "samples": 600,
        "held_out_samples": 200,
        "resolution": 12,
        "representation": Representation(width=8, **changes.pop("model", {})),
        "optimization": optimization,
        "machine": Machine(device="cpu", tensorboard=False),
    }
    return replace(base, **{**settings, **changes})


class TestRecipe:
    @pytest.fixture(autouse=True)
    def _coarsely_shown(self, monkeypatch):
        monkeypatch.setattr("torchimplicit.recipes.representations.shape.PICTURE", 60)
        monkeypatch.setattr("torchimplicit.recipes.representations.shape.SAMPLES", 500)

    @pytest.mark.parametrize("task", ["occupancy", "sdf"])
    @pytest.mark.parametrize("filter", ["siren", "fourier", "gabor"])
    @pytest.mark.parametrize("implicit", [True, False])
    def test_every_kind_is_fitted(self, tmp_path, task, filter, implicit):
        config = small(tmp_path, task=task, model={"filter": filter, "implicit": implicit, "frequencies": 4.0})
        model = build(config).train()
        found = descent(model, [torch.arange(300)] * 30, rate=2e-2)
        assert found[-1] < 0.8 * found[0]

    @pytest.mark.parametrize("task", ["occupancy", "sdf"])
    def test_a_run_leaves_a_surface(self, tmp_path, task):
        config = replace(small(tmp_path, task=task), optimization=replace(adam(40, 20, 2e-2), batch_size=600))
        config = replace(config, representation=replace(config.representation, frequencies=3.0, width=16))
        run = trained("implicit-shape", config, tmp_path / "run")
        found = run.read_json("surface.json")
        assert found["found"]
        assert found["chamfer"] < 0.15
        again = read_file(run.path / "surface.ply", 10**6)
        assert 0.5 < float(again.vertices.abs().max()) < 1.3, "in the file's own coordinates"
        for name in ("original", "reconstruction", "error", "slice", "curve"):
            assert min(Image.open(run.path / "figures" / f"{name}.png").size) > 50
        page = (run.path / "index.html").read_text()
        assert "The IoU on the validation points" in page
        assert "ball.ply: 320 faces." in page
        assert Results.of(run).test.figures["IoU"] > 0.5
        RUNNER.export(config, (24,), run, Console(quiet=True))
        finer = read_file(run.path / "export.obj", 10**6)
        assert len(finer.faces) > 2 * len(again.faces)

    @pytest.mark.parametrize("task", ["occupancy", "sdf"])
    def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(self, tmp_path, task):
        assert_resumes("implicit-shape", small(tmp_path, task=task), tmp_path)

    def test_a_field_without_a_surface(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torchimplicit.recipes.representations.shape.surface", lambda *given: None)
        config = small(tmp_path)
        run = trained("implicit-shape", config, tmp_path / "run")
        assert run.read_json("surface.json") == {"found": False}
        assert "no surface" in (run.path / "index.html").read_text()
        with pytest.raises(UserError, match="no surface"):
            RUNNER.export(config, (12,), run, Console(quiet=True))

    def test_a_shape_that_stands_on_its_z_axis(self, tmp_path):
        trained("implicit-shape", small(tmp_path, up="z"), tmp_path / "run")

    def test_the_distance_takes_exact_slopes(self, tmp_path):
        config = small(tmp_path, task="sdf")
        assert (config.equilibria.gradient, config.representation.amortize) == ("implicit", "solve")
        refused = replace(config, equilibria=replace(config.equilibria, gradient="one-step"))
        with pytest.raises(UserError, match="second derivative"):
            RUNNER.check(refused)
        assert small(tmp_path).equilibria.gradient == "neumann-phantom"

    @pytest.mark.parametrize("filter", ["siren", "fourier", "gabor"])
    @pytest.mark.parametrize("implicit", [True, False])
    def test_a_step_with_slopes_holds_no_more_than_is_reckoned(self, tmp_path, filter, implicit):
        model = {"filter": filter, "implicit": implicit, "frequencies": 8.0}
        config = small(tmp_path, task="sdf", samples=1500, batch_size=1500, model=model)
        config = replace(config, representation=replace(config.representation, width=32))
        task = build(config).train()
        held = peak_bytes(lambda: task.loss(torch.arange(1500)).backward(), torch.device("cpu"))
        assert 0.2 < held / (4 * 1500 * floats_a_point(config, slopes=True)) < 1

    def test_a_step_with_slopes_in_chunks_is_the_step_of_the_whole(self, tmp_path):
        config = small(tmp_path, task="sdf", model={"implicit": False})
        found = []
        for chunk in (600, 70):
            torch.manual_seed(0)
            task = build(config).train()
            task.chunk = chunk
            loss = task.loss(torch.arange(600))
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in task.parameters() if p.grad is not None)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_the_command_line_says_what_is_wrong(self, tmp_path, capsys):
        (tmp_path / "text.ply").write_text("no mesh")
        complaints = [
            (["--file", str(tmp_path / "text.ply")], "cannot be read"),
            (["--file", str(tmp_path / "none.obj")], "does not exist"),
            (["--resolution", "4"], "--resolution"),
            (["--resolution", "4096"], "--resolution"),
            (["--samples", "10"], "--samples"),
            (["--task", "sdf", "--gradient", "one-step"], "second derivative"),
            (["--gradient", "unrolled-phantom"], "--amortize"),
        ]
        assert_refused(capsys, "implicit-shape", tmp_path / "run", complaints)


def sphere(count=400):
    normals = torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=1)
    return torch.cat([3 * normals + 5, normals], 1).numpy()


def as_ply(path, table, kind="ascii", names=("x", "y", "z", "nx", "ny", "nz")):
    header = [f"format {kind} 1.0", f"element vertex {len(table)}", *(f"property float {n}" for n in names)]
    text = "\n".join(["ply", *header, "end_header", ""]).encode()
    order = {"binary_little_endian": "<f4", "binary_big_endian": ">f4"}.get(kind)
    rows = (
        "\n".join(" ".join(map(str, row)) for row in table).encode() if order is None else table.astype(order).tobytes()
    )
    path.write_bytes(text + rows)
    return path


class TestCloud:
    def test_files(self, tmp_path):
        torch.manual_seed(0)
        table = sphere()
        np.savetxt(tmp_path / "ball.xyz", table)
        kinds = ("ascii", "binary_little_endian", "binary_big_endian")
        files = [tmp_path / "ball.xyz", *(as_ply(tmp_path / f"{kind}.ply", table, kind) for kind in kinds)]
        for file in files:
            found = read_cloud(file, 1000)
            np.testing.assert_allclose(found.points.numpy(), table[:, :3], rtol=1e-6)
            np.testing.assert_allclose(found.normals.numpy(), table[:, 3:], atol=1e-6)
        assert read_cloud(small(tmp_path).file, 1000) is None, "it has faces"

    @pytest.mark.parametrize(
        ("write", "words"),
        [
            (lambda p: np.savetxt(p / "a.xyz", sphere()[:, :3]), "without normals"),
            (lambda p: np.savetxt(p / "a.xyz", sphere(20)), "100 at least"),
            (lambda p: np.savetxt(p / "a.xyz", sphere(2000)), "more than 1000 points"),
            (lambda p: (p / "a.xyz").write_text("1 2 3 4 5 6\nfoo\n"), "are no numbers"),
            (lambda p: (p / "a.xyz").write_text("1 2 3 4 5 6\n1 2 3\n"), "line 2 has 3 numbers"),
            (lambda p: as_ply(p / "a.ply", sphere()[:, :3], names=("x", "y", "z")), "without normals"),
            (lambda p: (p / "a.ply").write_bytes(as_ply(p / "a.ply", sphere()).read_bytes()[:3000]), "cut short"),
        ],
    )
    def test_files_that_are_refused(self, tmp_path, write, words):
        write(tmp_path)
        (file,) = tmp_path.glob("a.*")
        with pytest.raises(UserError, match=words):
            read_cloud(file, 1000)

    def test_a_surface_through_points(self, tmp_path):
        torch.manual_seed(0)
        np.savetxt(tmp_path / "ball.xyz", sphere(2000))
        config = small(tmp_path, task="sdf", file=tmp_path / "ball.xyz", batch_size=600)
        with pytest.raises(UserError, match="add --task sdf"):
            RUNNER.check(replace(config, task="occupancy"))
        model = replace(config.representation, width=16, frequencies=2.0, implicit=False)
        config = replace(config, representation=model, optimization=replace(adam(300, 100, 1e-2), batch_size=600))
        run = trained("implicit-shape", config, tmp_path / "run")
        found = run.read_json("surface.json")
        assert found["to_surface"] < 0.05
        assert found["normals"] > 0.9
        vertices = read_file(run.path / "surface.ply", 10**6).vertices
        assert float((vertices - 5).norm(dim=1).mean()) == pytest.approx(3, rel=0.1), "in the file's own coordinates"
        assert "2000 points, with normals" in (run.path / "index.html").read_text()


@pytest.mark.parametrize(("up", "front", "upward"), [("x", 2, 0), ("y", 2, 1), ("z", 1, 2)])
def test_a_mesh_is_seen_from_its_front_whichever_axis_is_up(up, front, upward):
    turned = _upright(replace(shape(), up=up))
    assert torch.det(turned) == 1
    right, above, toward = view(turn=0.0, tilt=0.0) @ turned
    assert toward[front].abs() == 1
    assert toward[front] == (-1 if up == "z" else 1)
    assert above[upward] == 1
    assert right.abs().sum() == 1
