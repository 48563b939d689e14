"""A mesh as a field of occupancy or signed distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.representations.cloud import Cloud, OnSurface, read_cloud
from torchimplicit.recipes.representations.fit import (
    FieldRunner,
    FieldTask,
    Parts,
    Points,
    Representation,
    centres,
    check_slopes,
    noted,
    sampled,
    truncated,
    write_page,
)
from torchimplicit.recipes.representations.image import save
from torchimplicit.recipes.representations.mesh import (
    Edges,
    MadeName,
    Mesh,
    MeshTree,
    extracted,
    heat,
    made,
    prepared,
    read_file,
    sample,
    section,
    view,
    write_obj,
    write_ply,
)
from torchimplicit.recipes.representations.mesh import drawn as mesh_drawn
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import canvas, save_figure, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.task import Metric, generator
from torchimplicit.recipes.runtime.trainer import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -- settings ----------------------------------------------------------------------------------------------------------


LARGEST_GRID = 1024


LONGEST = 1.8
"""Longest side of the mesh in the field's coordinates."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A field fitted to a mesh."""

    file: Path | None = None
    """Your own mesh: OBJ, PLY, STL or OFF; or, with --task sdf, points with normals: XYZ, or PLY without faces."""

    shape: Literal["knot", "gyroid"] = "knot"
    """Built-in shape, if --file is not given: a tube around a torus knot, or a ball of gyroid walls."""

    most_faces: int = 1_000_000
    """Largest number of faces; files with more are refused."""

    task: Literal["occupancy", "sdf"] = "occupancy"
    """occupancy: the field is the logit of being inside. sdf: it is the signed distance, trained with its slopes, which
    needs exact second derivatives: the defaults --gradient neumann-phantom and --amortize refresh become implicit and
    solve."""

    supervision: Literal["distance", "surface"] = "distance"
    """Data for --task sdf. distance: the distances to the mesh. surface: only points on the surface and their
    normals."""

    distance_weight: float = 10.0
    """Weight of the error in the distances (--task sdf)."""

    normal_weight: float = 1.0
    """Weight of the error in the normals on the surface (--task sdf)."""

    eikonal_weight: float = 0.1
    """Weight of the eikonal term, which penalizes slopes of length other than 1 (--task sdf)."""

    samples: int = 60_000
    """Number of training points: half near the surface, half anywhere in the box."""

    held_out_samples: int = 20_000
    """Number of points for validation, and the same number for the test."""

    sample_seed: int = 0
    """Random seed of the points."""

    resolution: int = 96
    """Grid points along the longest side, for extracting the surface by marching cubes."""

    up: Literal["x", "y", "z"] = "y"
    """Axis of the mesh that points up in the pictures. The front then faces z, or, with z up, -y."""

    turn: float = 35.0
    """Rotation of the first view about that axis, in degrees from the front. The second view shows the back."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "most_faces", "distance_weight", "samples", "held_out_samples", "resolution")
        not_negative(self, "normal_weight", "eikonal_weight", "sample_seed")
        check_grid("--resolution", self.resolution)
        if min(self.samples, self.held_out_samples) < 100:
            raise UserError("--samples and --held-out-samples must be 100 at least")
        if self.task == "sdf":
            self._become_exact()

    def _become_exact(self) -> None:
        """Switch to exact solves and gradients: the defaults of occupancy have no second derivative."""
        solve, chosen = self.equilibria, self.representation
        if solve == truncated():
            object.__setattr__(self, "equilibria", exact())
        elif solve.gradient == truncated().gradient:
            object.__setattr__(self, "equilibria", replace(solve, gradient="implicit"))
        if chosen.amortize == "refresh":
            object.__setattr__(self, "representation", replace(chosen, amortize="solve"))


def check_grid(option: str, longest: int) -> None:
    """Raise where a grid is too coarse for a surface, or not practical."""
    if not 8 <= longest <= LARGEST_GRID:
        raise UserError(f"{option} {longest} must lie between 8 and {LARGEST_GRID}")


def exact() -> Equilibria:
    """Settings for equilibria whose slopes are in the loss."""
    return Equilibria(solver_steps=60, tolerance=1e-4, gradient="implicit", backward_tolerance=1e-3, backward_steps=60)


def adam(steps: int, validate_every: int, learning_rate: float = 3e-3) -> Optimization:
    """Adam with a subset of the points in every step."""
    return Optimization(
        steps=steps, batch_size=6000, learning_rate=learning_rate, schedule="cosine", validate_every=validate_every
    )


def shape() -> ShapeConfig:
    """A shape of 60 000 points, some minutes on one core. The paper's occupancy: --samples 500000 --batch-size 50000
    --width 256 --steps 10000 --learning-rate 5e-4 --frequencies 256."""
    return ShapeConfig(optimization=adam(1000, 100), equilibria=truncated())


# -- A mesh as points to fit: where they are, and what is known there --------------------------------------------------


TaskName = Literal["occupancy", "sdf"]
MARGIN = 0.1
"""Margin around the shape on every side."""

NEAR = (0.01, 0.05)
"""Standard deviations of the points near the surface, each for one half of them."""


@dataclass(frozen=True)
class Frame:
    """The field's coordinates in those of the file: ``file = centre + scale * field``."""

    centre: Tensor
    scale: float

    @staticmethod
    def of(mesh: Mesh) -> Frame:
        """Return the frame in which the mesh's box is in the middle and its longest side is :data:`LONGEST`."""
        low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
        return Frame((low + high) / 2, float((high - low).max()) / LONGEST)

    def inward(self, mesh: Mesh) -> Mesh:
        """Convert a mesh from the file's to the field's coordinates."""
        return Mesh((mesh.vertices - self.centre) / self.scale, mesh.faces)

    def outward(self, mesh: Mesh) -> Mesh:
        """Convert back to the file's coordinates."""
        return Mesh(mesh.vertices * self.scale + self.centre, mesh.faces)


@final
class ShapePoints(Points):
    """Points around a mesh, with their values.

    Args:
        corner: corner of the domain.
        coordinates: ``[points, 3]``.
        values: ``[points, k]``. For occupancy k is 2: 1 inside and 0 outside; and whether the point was drawn near the
            surface. For the distance it is 5: the distance, negative inside; its gradient, which is the normal on the
            surface; and the same.
    """

    coordinates: Tensor
    values: Tensor
    inputs = 3
    outputs = 1

    def __init__(self, corner: tuple[float, ...], coordinates: Tensor, values: Tensor):
        super().__init__()
        self.corner = corner
        self.register_buffer("coordinates", coordinates.float(), persistent=False)
        self.register_buffer("values", values.float(), persistent=False)

    def __len__(self) -> int:
        return len(self.coordinates)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.coordinates.device)
        return self.coordinates[index], self.values[index]


class Counts(NamedTuple):
    """Numbers of points: for training, and for validation and test each."""

    training: int
    held_out: int


def drawn(mesh: Mesh, tree: MeshTree, task: TaskName, counts: Counts, seed: int) -> tuple[ShapePoints, Parts]:
    """Points around a mesh in the field's coordinates: half near the surface, half anywhere in the domain; for the
    distance, a third of the training points lie on the surface.

    Raises:
        UserError: if nothing is inside.
    """
    half = (mesh.vertices.amax(0) - mesh.vertices.amin(0)) / 2
    corner = half + MARGIN
    random = generator(seed, -11)
    on = counts.training // 3 if task == "sdf" else 0
    pieces = []
    for count, surface in ((counts.training, on), (counts.held_out, 0), (counts.held_out, 0)):
        near = (count - surface) // 2
        anywhere = (2 * torch.rand(count - surface - near, 3, generator=random, dtype=torch.float64) - 1) * corner
        sampled = sample(mesh, near + surface, random)
        off = torch.randn(near + surface, 3, generator=random, dtype=torch.float64)
        off[: near // 2] *= NEAR[0]
        off[near // 2 : near] *= NEAR[1]
        off[near:] = 0
        beside = torch.maximum(torch.minimum(sampled.points + off, corner), -corner)
        x = torch.cat([anywhere, beside])
        flag = torch.cat([torch.zeros(len(anywhere)), torch.ones(len(beside))])
        if task == "occupancy":
            values = tree.winding(x).gt(0.5).double()[:, None]
        else:
            values = _distances(mesh, tree, x)
            if surface:
                values[-surface:, 0] = 0
                values[-surface:, 1:] = mesh.normals()[sampled.faces[-surface:]]
        pieces.append((x, torch.cat([values, flag[:, None]], 1)))
    x, values = (torch.cat(sampled) for sampled in zip(*pieces, strict=True))
    points = ShapePoints(tuple(corner.tolist()), x, values)
    inside = values[:, 0] > 0.5 if task == "occupancy" else values[:, 0] < 0
    if inside.double().mean() < 1e-4:
        raise UserError("nothing is inside this surface; it may be a sheet, or holes may open it; close it first")
    bounds = [0, counts.training, counts.training + counts.held_out, counts.training + 2 * counts.held_out]
    return points, Parts(*(torch.arange(a, b) for a, b in pairwise(bounds)))


def scattered(cloud: Cloud, counts: Counts, seed: int) -> tuple[ShapePoints, Parts]:
    """Points of a cloud, and points anywhere around it with unknown (NaN) values. A third of the training points are
    the cloud's, of which a tenth each is held out for validation and test."""
    half = (cloud.points.amax(0) - cloud.points.amin(0)) / 2
    corner = half + MARGIN
    random = generator(seed, -13)
    order = torch.randperm(len(cloud.points), generator=random)
    held = max(1, len(order) // 10)
    on = counts.training // 3
    chosen = order[2 * held :][torch.randint(len(order) - 2 * held, (on,), generator=random)]
    anywhere = (2 * torch.rand(counts.training - on, 3, generator=random, dtype=torch.float64) - 1) * corner
    unknown = torch.full((len(anywhere), 5), torch.nan, dtype=torch.float64)
    unknown[:, 1:] = 0

    def known(which: Tensor) -> Tensor:
        flags = torch.ones(len(which), 1, dtype=torch.float64)
        return torch.cat([0 * flags, cloud.normals[which], flags], 1)

    tests = [order[:held], order[held : 2 * held]]
    x = torch.cat([anywhere, *(cloud.points[which] for which in (chosen, *tests))])
    values = torch.cat([unknown, *(known(which) for which in (chosen, *tests))])
    bounds = [0, counts.training, counts.training + held, counts.training + 2 * held]
    parts = Parts(*(torch.arange(a, b) for a, b in pairwise(bounds)))
    return ShapePoints(tuple(corner.tolist()), x, values), parts


def _distances(mesh: Mesh, tree: MeshTree, x: Tensor) -> Tensor:
    """The signed distance and its gradient, ``[points, 4]``."""
    distance, nearest, face = tree.closest(x)
    sign = torch.where(tree.winding(x) > 0.5, -1.0, 1.0).double()
    slope = sign[:, None] * (x - nearest) / distance[:, None].clamp_min(1e-300)
    slope = torch.where(distance[:, None] > 1e-9, slope, mesh.normals()[face])
    return torch.cat([(sign * distance)[:, None], slope], 1)


# -- What a field of a shape is trained by, and what it is judged by ---------------------------------------------------


def cross_entropy(field: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of the field as the logit of being inside."""
    return functional.binary_cross_entropy_with_logits(field(x)[:, 0], y[:, 0])


@final
@dataclass(frozen=True, kw_only=True)
class DistanceLoss:
    """Sum of three means over the points: error of the distance, error of the slope on the surface, and deviation of
    its length from 1 everywhere (the eikonal term of Gropp et al. 2020, *Implicit geometric regularization*).

    With ``surface_only`` no distance is given but zero on the surface, and values near zero are unlikely elsewhere
    (Sitzmann et al. 2020, *Implicit neural representations with periodic activation functions*, eq. 6).

    Attributes:
        distance, normal, eikonal: weights of the three terms.
        surface_only: see above.
        sharpness: s in the last term, :math:`\\exp(-s|f|)`.
    """

    distance: float
    normal: float
    eikonal: float
    surface_only: bool = False
    sharpness: float = 100.0

    def __call__(self, field: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """See :data:`~torchimplicit.recipes.representations.fit.Criterion`; y: :class:`.points.ShapePoints`."""
        with torch.enable_grad():
            x = x.requires_grad_()
            value = field(x)[:, 0]
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        on = y[:, 0] == 0
        length = (slope.square().sum(1) + 1e-12).sqrt()
        normal = torch.where(on, 1 - (slope * y[:, 1:4]).sum(1) / length, 0)
        if self.surface_only:
            miss = torch.where(on, value.abs(), 0) + torch.where(on, 0, (-self.sharpness * value.abs()).exp() / 30)
        else:
            miss = (value - y[:, 0]).abs()
        return (self.distance * miss + self.normal * normal + self.eikonal * (length - 1).square()).mean()


@final
@dataclass(frozen=True)
class Overlap:
    """Intersection over union of the insides, over all points and over those near the surface.

    Attributes:
        distance: whether the field is a distance, negative inside; otherwise a logit, positive inside.
    """

    distance: bool

    @property
    def metric(self) -> Metric:
        return Metric("IoU", "%", "max")

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """Intersections and unions of both point sets, the error, and the number of points."""
        value, truth = values[:, 0], y[:, 0]
        near = y[:, -1] > 0.5
        if self.distance:
            inside, real = value < 0, truth < 0
            misfit = (value - truth).abs().double().sum()
        else:
            inside, real = value > 0, truth > 0.5
            misfit = functional.binary_cross_entropy_with_logits(value, truth, reduction="none").double().sum()
        both, either = inside & real, inside | real
        counts = [(both & ~near).sum(), (either & ~near).sum(), (both & near).sum(), (either & near).sum()]
        return torch.stack([*(n.double() for n in counts), misfit, misfit.new_tensor(float(len(y)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Both ratios, and the mean cross-entropy or absolute error of the distance as ``loss``."""
        both, either, both_near, either_near, misfit, count = sums
        return {"IoU": both / max(either, 1.0), "IoU near": both_near / max(either_near, 1.0), "loss": misfit / count}


# -- The mesh that is fitted, as read and as the field sees it ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A mesh.

    Attributes:
        name: name to display.
        mesh: in the coordinates of the field.
        frame: where these lie in those of the file.
        notes: what was done to it.
        cloud: where points with normals are all that is known: the mesh then has these vertices and no faces.
    """

    name: str
    mesh: Mesh
    frame: Frame
    notes: tuple[str, ...] = field(default=())
    cloud: Cloud | None = None

    @cached_property
    def tree(self) -> MeshTree:
        """The tree of the mesh."""
        return MeshTree(self.mesh)

    def describe(self) -> str:
        """Describe the shape in one sentence."""
        known = f"{len(self.mesh.faces)} faces" if self.cloud is None else f"{len(self.mesh.vertices)} points"
        return noted(f"{self.name}: {known}", self.notes)


def subject(config: ShapeConfig) -> Subject:
    """Read or make the shape that is fitted.

    Raises:
        UserError: if it cannot be read, or is no solid.
    """
    return _read(config.file, config.shape, config.most_faces)


@lru_cache(maxsize=1)
def _read(file: Path | None, shape: MadeName, most_faces: int) -> Subject:
    """Cached, as the check, the points and the display need it."""
    name = shape if file is None else file.name
    cloud = None if file is None else read_cloud(file, most_faces)
    if cloud is not None:
        bare = Mesh(cloud.points, torch.zeros(0, 3, dtype=torch.int64))
        frame = Frame.of(bare)
        inward = frame.inward(bare)
        return Subject(name, inward, frame, ("with normals",), Cloud(inward.vertices, cloud.normals))
    mesh, notes = prepared(made(shape) if file is None else read_file(file, most_faces), name)
    frame = Frame.of(mesh)
    return Subject(name, frame.inward(mesh), frame, notes)


# -- How far a surface is from the true one ----------------------------------------------------------------------------


SAMPLES = 10000


@dataclass(frozen=True)
class Comparison:
    """A surface compared with the true one; lengths are shares of the true mesh's longest side.

    Attributes:
        chamfer: the mean of the two next.
        to_truth: mean distance of the surface's points to the true one.
        from_truth: mean distance of the true surface's points to it.
        normals: mean absolute cosine between the normals of a point and of its nearest one, both ways.
        vertices, faces: vertices and faces of the surface.
        watertight: whether every edge has two faces.
        volume: over the true one's.
    """

    chamfer: float
    to_truth: float
    from_truth: float
    normals: float
    vertices: int
    faces: int
    watertight: bool
    volume: float


def compared(mesh: Mesh, truth: Mesh, tree: MeshTree, seed: int = 0) -> Comparison:
    """Compare two meshes in the field's coordinates; ``tree`` is the true one's. Distances go from points on one
    surface to the other surface itself, so that sampling adds no floor."""
    random = torch.Generator().manual_seed(seed)
    ways = []
    for one, other, at in ((mesh, truth, tree), (truth, mesh, MeshTree(mesh))):
        points = sample(one, SAMPLES, random)
        distance, _, face = at.closest(points.points)
        cosine = (one.normals()[points.faces] * other.normals()[face]).sum(1).abs()
        ways.append((float(distance.mean()) / LONGEST, float(cosine.mean())))
    (to, nearest), (back, others) = ways
    edges = Edges.of(mesh)
    return Comparison(
        chamfer=(to + back) / 2,
        to_truth=to,
        from_truth=back,
        normals=(nearest + others) / 2,
        vertices=len(mesh.vertices),
        faces=len(mesh.faces),
        watertight=edges.open == 0 and edges.crowded == 0,
        volume=mesh.volume / truth.volume,
    )


# -- What there is to see of a shape's fit -----------------------------------------------------------------------------


PICTURE = 360
MOST_ERROR = 0.02
"""Error at the bright end of the colour scale, as a share of the longest side."""


def show(config: ShapeConfig, task: FieldTask, results: Results, run: Run) -> None:
    """Write the surface, pictures of it and of the true one, a slice of the field, the comparison and the page."""
    true = subject(config)
    if true.cloud is not None:
        _show_cloud(config, task, results, run, true)
        return
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    mesh = surface(config, task, config.resolution)
    eyes = [view(turn) @ _upright(config) for turn in (config.turn, config.turn + 180)]
    pictures = [(folder / "original.png", "The mesh, from two sides.")]
    save(torch.cat([mesh_drawn(true.mesh, PICTURE, eye) for eye in eyes], 1), pictures[0][0])
    if mesh is None:
        run.write_json("surface.json", {"found": False})
        notes = ["The field is nowhere zero: there is no surface."]
    else:
        write_obj(true.frame.outward(mesh), run.product("surface.obj"))
        write_ply(true.frame.outward(mesh), run.product("surface.ply"))
        figures = compared(mesh, true.mesh, true.tree)
        run.write_json("surface.json", {"found": True, "resolution": config.resolution, **vars(figures)})
        away, _, _ = true.tree.closest(mesh.vertices)
        colours = heat(away / LONGEST, MOST_ERROR)
        pictures += [
            (folder / "reconstruction.png", "The surface of the field (surface.ply, surface.obj)."),
            (
                folder / "error.png",
                f"Its distance from the mesh: dark is none, bright {100 * MOST_ERROR:g} % of the longest side.",
            ),
        ]
        save(torch.cat([mesh_drawn(mesh, PICTURE, eye) for eye in eyes], 1), pictures[1][0])
        save(torch.cat([mesh_drawn(mesh, PICTURE, eye, colours) for eye in eyes], 1), pictures[2][0])
        notes = [_sentence(figures, config.resolution)]
    pictures.append((folder / "slice.png", "The field on a plane through the middle; the line is the mesh."))
    save_figure(_slice(config, task, true), pictures[-1][0], 110)
    write_page("A shape as a field", task, results, run, pictures, notes)


def _show_cloud(config: ShapeConfig, task: FieldTask, results: Results, run: Run, true: Subject) -> None:
    """Write what can be shown if only a point cloud is known."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    mesh = surface(config, task, config.resolution)
    pictures: list[tuple[Path, str]] = []
    if mesh is None:
        run.write_json("surface.json", {"found": False})
        notes = ["The field is nowhere zero: there is no surface."]
    else:
        write_obj(true.frame.outward(mesh), run.product("surface.obj"))
        write_ply(true.frame.outward(mesh), run.product("surface.ply"))
        at, y = task.points.at(task.parts.test)
        away, _, face = MeshTree(mesh).closest(at.double().cpu())
        agree = (mesh.normals()[face] * y[:, 1:4].double().cpu()).sum(1)
        figures = {"to_surface": float(away.mean()) / LONGEST, "normals": float(agree.mean())}
        run.write_json("surface.json", {"found": True, "resolution": config.resolution, **figures})
        notes = [
            f"At {config.resolution} grid points the test points are {100 * figures['to_surface']:.3f} % of the "
            f"longest side from the surface, and their normals agree with it to {figures['normals']:.4f} (mean cosine)."
        ]
        eyes = [view(turn) @ _upright(config) for turn in (config.turn, config.turn + 180)]
        pictures.append((folder / "reconstruction.png", "The surface of the field (surface.ply, surface.obj)."))
        save(torch.cat([mesh_drawn(mesh, PICTURE, eye) for eye in eyes], 1), pictures[-1][0])
    write_page("A shape as a field", task, results, run, pictures, notes)


def export(config: ShapeConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.ply`` and ``export.obj``: the surface on a grid with this many points along the longest side."""
    if len(sizes) != 1:
        raise UserError("--export-size takes one number for a shape: the grid points of the longest side")
    check_grid("--export-size", sizes[0])
    mesh = surface(config, task, sizes[0])
    if mesh is None:
        raise UserError(f"the field of {run} is nowhere zero, and has no surface")
    outward = subject(config).frame.outward(mesh)
    write_obj(outward, run.product("export.obj"))
    write_ply(outward, run.product("export.ply"))
    return run.product("export.ply")


def surface(config: ShapeConfig, task: FieldTask, longest: int) -> Mesh | None:
    """The field's surface in its own coordinates; ``None`` if it has none."""
    sign = -1.0 if config.task == "sdf" else 1.0

    def height(x: Tensor) -> Tensor:
        return sign * sampled(task.model, iter([x]))[:, 0]

    return extracted(height, task.points.corner, longest, config.representation.memory_mb, min(task.chunk, 65536))


def _sentence(figures: Comparison, resolution: int) -> str:
    return (
        f"At {resolution} grid points: Chamfer distance {100 * figures.chamfer:.3f} % of the longest side (from the "
        f"surface {100 * figures.to_truth:.3f} %, to it {100 * figures.from_truth:.3f} %), normals agree to "
        f"{figures.normals:.4f}, {figures.faces} faces, {'' if figures.watertight else 'not '}watertight, "
        f"{figures.volume:.4f} of the mesh's volume."
    )


def _upright(config: ShapeConfig) -> Tensor:
    """Rotation from the file's axes to axes with y up and z to the front."""
    rows = {
        "x": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
        "y": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "z": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    }
    return torch.tensor(rows[config.up], dtype=torch.float64)


def _slice(config: ShapeConfig, task: FieldTask, true: Subject) -> Figure:
    """The field in the plane through the middle that faces the viewer."""
    corner = task.points.corner
    flat, across, upward = {"x": (2, 1, 0), "y": (2, 0, 1), "z": (1, 0, 2)}[config.up]
    n = 160
    sizes = tuple(max(2, round(n * corner[i] / max(corner))) for i in (upward, across))
    plane = centres(torch.arange(sizes[0] * sizes[1]), sizes, (corner[upward], corner[across]), torch.float64)
    x = torch.zeros(len(plane), 3, dtype=torch.float64)
    x[:, upward], x[:, across] = plane.unbind(1)
    x[:, flat] = 0
    values = sampled(task.model, iter(x.float().split(min(task.chunk, 65536)))).reshape(sizes)
    outline = section(true.mesh, flat)[:, :, [across, upward]].numpy()
    box = (-corner[across], corner[across], -corner[upward], corner[upward])
    if config.task == "sdf":
        most, colours, label = float(values.abs().max()), "RdBu", "signed distance"
    else:
        values = values.sigmoid() - 0.5
        most, colours, label = 0.5, "RdBu_r", "probability of being inside, less one half"
    from matplotlib.collections import LineCollection

    with styled():
        figure = canvas(5.6, 4.6)
        ax = figure.subplots()
        ax.grid(False)
        shown = ax.imshow(values.numpy(), cmap=colours, vmin=-most, vmax=most, origin="lower", extent=box)
        if config.task == "sdf":
            ax.contour(values.numpy(), 16, colors="#00000055", linewidths=0.5, extent=box)
        ax.add_collection(LineCollection(list(outline), colors="black", linewidths=1.2))
        figure.colorbar(shown, ax=ax, label=label)
        ax.set(xticks=[], yticks=[])
    return figure


# -- The recipe that fits shapes ---------------------------------------------------------------------------------------


FREQUENCIES = {"occupancy": 16.0, "sdf": 10.0}
"""Scale of the frequencies, by task."""


def build(config: ShapeConfig) -> FieldTask:
    """The task."""
    of, counts = subject(config), Counts(config.samples, config.held_out_samples)
    points, parts = _drawn(of, config.task, counts, config.sample_seed)
    distance = config.task == "sdf"
    slopes = DistanceLoss(
        distance=config.distance_weight,
        normal=config.normal_weight,
        eikonal=config.eikonal_weight,
        surface_only=config.supervision == "surface" or of.cloud is not None,
    )
    return FieldTask(
        config,
        points,
        parts,
        FREQUENCIES[config.task],
        slopes if distance else cross_entropy,
        about=f"{subject(config).describe()} {'Signed distance' if distance else 'Occupancy'}.",
        scoring=Overlap(distance) if of.cloud is None else OnSurface(LONGEST),
        slopes=distance,
        held="implicit",
    )


@lru_cache(maxsize=1)
def _drawn(of: Subject, task: TaskName, counts: Counts, seed: int) -> tuple[ShapePoints, Parts]:
    """Cached, as training and display need it."""
    if of.cloud is not None:
        return scattered(of.cloud, counts, seed)
    return drawn(of.mesh, of.tree, task, counts, seed)


def ready(config: ShapeConfig) -> None:
    """Raise if the mesh cannot be used, or the settings are incompatible with its slopes."""
    if config.task == "sdf":
        check_slopes(config)
    if subject(config).cloud is not None and config.task != "sdf":
        raise UserError("of points with normals no inside is known before a surface is found: add --task sdf")


RUNNER = FieldRunner(build, show, ready, export)
