"""What there is to see of a shape's fit."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from torchimplicit.recipes.fields.images.pictures import save
from torchimplicit.recipes.fields.model import sampled
from torchimplicit.recipes.fields.points import centres
from torchimplicit.recipes.fields.report import write_page
from torchimplicit.recipes.fields.shape.compare import Comparison, compared
from torchimplicit.recipes.fields.shape.config import LONGEST, ShapeConfig, check_grid
from torchimplicit.recipes.fields.shape.files import write_obj, write_ply
from torchimplicit.recipes.fields.shape.mesh import Mesh, section
from torchimplicit.recipes.fields.shape.render import drawn, heat, view
from torchimplicit.recipes.fields.shape.subject import Subject, subject
from torchimplicit.recipes.fields.shape.surface import extracted
from torchimplicit.recipes.fields.task import FieldTask
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import FIGURE, save_figure
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results

PICTURE = 360
MOST_ERROR = 0.02
"""Of the longest side, at the bright end of the error's colours."""


def show(config: ShapeConfig, task: FieldTask, results: Results, run: Run) -> None:
    """Write the surface, pictures of it beside the truth, a slice of the field, the comparison and the page."""
    true = subject(config)
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    found = surface(config, task, config.resolution)
    eyes = [view(turn) @ _upright(config) for turn in (35.0, 215.0)]
    pictures = [(folder / "original.png", "The mesh, from two sides.")]
    save(torch.cat([drawn(true.mesh, PICTURE, eye) for eye in eyes], 1), pictures[0][0])
    if found is None:
        run.write_json("surface.json", {"found": False})
        notes = ["The field is nowhere zero: there is no surface."]
    else:
        write_obj(true.frame.outward(found), run.product("surface.obj"))
        write_ply(true.frame.outward(found), run.product("surface.ply"))
        figures = compared(found, true.mesh, true.tree)
        run.write_json("surface.json", {"found": True, "resolution": config.resolution, **vars(figures)})
        away, _, _ = true.tree.closest(found.vertices)
        colours = heat(away / LONGEST, MOST_ERROR)
        pictures += [
            (folder / "reconstruction.png", "The surface of the field (surface.ply, surface.obj)."),
            (
                folder / "error.png",
                f"Its distance from the mesh: dark is none, bright {100 * MOST_ERROR:g} % of the longest side.",
            ),
        ]
        save(torch.cat([drawn(found, PICTURE, eye) for eye in eyes], 1), pictures[1][0])
        save(torch.cat([drawn(found, PICTURE, eye, colours) for eye in eyes], 1), pictures[2][0])
        notes = [_sentence(figures, config.resolution)]
    pictures.append((folder / "slice.png", "The field on a plane through the middle; the line is the mesh."))
    save_figure(_slice(config, task, true), pictures[-1][0], 110)
    write_page("A shape as a field", task, results, run, pictures, notes)


def export(config: ShapeConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.ply`` and ``export.obj``: the surface on a grid of so many points along the longest side."""
    if len(sizes) != 1:
        raise UserError("--export-size takes one number for a shape: the grid points of the longest side")
    check_grid("--export-size", sizes[0])
    found = surface(config, task, sizes[0])
    if found is None:
        raise UserError(f"the field of {run} is nowhere zero, and has no surface")
    outward = subject(config).frame.outward(found)
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
    """From the file's axes to those of which y points up."""
    if config.up == "y":
        return torch.eye(3, dtype=torch.float64)
    return torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]], dtype=torch.float64)


def _slice(config: ShapeConfig, task: FieldTask, true: Subject) -> Figure:
    """The field where the third coordinate (the depth, where y is up) is zero."""
    corner = task.points.corner
    flat = 2 if config.up == "y" else 1
    across, upward = (0, 1) if config.up == "y" else (0, 2)
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
    with matplotlib.rc_context({**FIGURE, "axes.grid": False}):
        figure = Figure(figsize=(5.6, 4.6), layout="constrained")
        ax = figure.subplots()
        shown = ax.imshow(values.numpy(), cmap=colours, vmin=-most, vmax=most, origin="lower", extent=box)
        if config.task == "sdf":
            ax.contour(values.numpy(), 16, colors="#00000055", linewidths=0.5, extent=box)
        ax.add_collection(LineCollection(list(outline), colors="black", linewidths=1.2))
        figure.colorbar(shown, ax=ax, label=label)
        ax.set(xticks=[], yticks=[])
    return figure
