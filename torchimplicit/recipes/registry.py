"""The recipes and the tables by name. Looking one up imports that one only."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from torchimplicit.recipes.runtime.errors import UserError

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Runner


@dataclass(frozen=True)
class Entry:
    """Where a recipe, or a table, is.

    Attributes:
        summary: one line for ``torchimplicit list``.
        settings: ``module:function``, the function giving the default settings.
        runner: ``module`` or ``module:object``, the :class:`Runner` of such settings.
    """

    summary: str
    settings: str
    runner: str


_HERE = "torchimplicit.recipes"

RECIPES = {
    "demo": Entry(
        "Three gradient estimators side by side on 8×8 digits, with pictures, in under three minutes.",
        f"{_HERE}.phantom.demo:demo",
        f"{_HERE}.phantom.demo",
    ),
    "digits": Entry(
        "One convolutional equilibrium classifier of 8×8 digits, with the estimator of your choice.",
        f"{_HERE}.phantom.demo:digits",
        f"{_HERE}.phantom.demo",
    ),
    "language-wikitext2": Entry(
        "A small DEQ transformer on WikiText-2, minutes on a CPU.",
        f"{_HERE}.phantom.language_settings:wikitext2",
        f"{_HERE}.phantom.language:RUNNER",
    ),
    "language-wikitext103": Entry(
        "The DEQ transformer of the papers (98M parameters) on WikiText-103, for GPUs.",
        f"{_HERE}.phantom.language_settings:wikitext103",
        f"{_HERE}.phantom.language:RUNNER",
    ),
    "images-digits": Entry(
        "A small multiscale equilibrium model (MDEQ) on the bundled digits, in seconds.",
        f"{_HERE}.phantom.image_settings:digits",
        f"{_HERE}.phantom.images:RUNNER",
    ),
    "images-mnist": Entry(
        "The same model on MNIST, in minutes on a CPU.",
        f"{_HERE}.phantom.image_settings:mnist",
        f"{_HERE}.phantom.images:RUNNER",
    ),
    "images-cifar10": Entry(
        "MDEQ-Tiny on CIFAR-10 with the published settings.",
        f"{_HERE}.phantom.image_settings:cifar10",
        f"{_HERE}.phantom.images:RUNNER",
    ),
    "images-cifar10-large": Entry(
        "MDEQ-Large on CIFAR-10 with the published settings.",
        f"{_HERE}.phantom.image_settings:cifar10_large",
        f"{_HERE}.phantom.images:RUNNER",
    ),
    "images-imagenet": Entry(
        "MDEQ-Small on ImageNet with the published settings.",
        f"{_HERE}.phantom.image_settings:imagenet",
        f"{_HERE}.phantom.images:RUNNER",
    ),
    "images-cost": Entry(
        "What a training step of an image model costs with each gradient, in turn at the same trained weights.",
        f"{_HERE}.phantom.images:default",
        f"{_HERE}.phantom.images:COSTS",
    ),
    "graphs-cox2": Entry(
        "IGNN on a fold of COX2 (467 molecules) with the published settings.",
        f"{_HERE}.phantom.graphs_settings:cox2",
        f"{_HERE}.phantom.graphs:TRAINER",
    ),
    "graphs-proteins": Entry(
        "IGNN on a fold of PROTEINS (1113 graphs) with the published settings.",
        f"{_HERE}.phantom.graphs_settings:proteins",
        f"{_HERE}.phantom.graphs:TRAINER",
    ),
    "graphs-ppi": Entry(
        "IGNN on PPI (24 graphs, 121 labels a node) with the published settings, for GPUs.",
        f"{_HERE}.phantom.graphs_settings:ppi",
        f"{_HERE}.phantom.graphs:TRAINER",
    ),
    "graphs-chains": Entry(
        "IGNN on directed chains whose class stands on the first node alone, in a minute or two on a CPU.",
        f"{_HERE}.phantom.graphs_settings:chains",
        f"{_HERE}.phantom.graphs:TRAINER",
    ),
    "graphs-cost": Entry(
        "What a step of each gradient estimator costs on COX2 or PROTEINS, timed in turn at the same weights.",
        f"{_HERE}.phantom.graphs_table:cost",
        f"{_HERE}.phantom.graphs_cost:RUNNER",
    ),
    "phantom-layer": Entry(
        "Phantom gradients on a random layer beside the exact one, over steps and damping, in seconds.",
        f"{_HERE}.phantom.settings:layer",
        f"{_HERE}.phantom.layer:RUNNER",
    ),
    "phantom-training": Entry(
        "An image classifier whose gradient is compared with many estimators along training.",
        f"{_HERE}.phantom.settings:training",
        f"{_HERE}.phantom.looking:RUNNER",
    ),
    "ofdft-small": Entry(
        "An orbital-free density functional for H2, H2O, NH3 and CH4, trained by its minima, in minutes.",
        f"{_HERE}.density.settings:small",
        f"{_HERE}.density.training",
    ),
    "ofdft-one": Entry(
        "The same for one molecule, as fine-tuned by implicit differentiation or equilibrium propagation.",
        f"{_HERE}.density.settings:single",
        f"{_HERE}.density.training",
    ),
    "ofdft-qm9": Entry(
        "The same for the smallest molecules of QM9, some held out.",
        f"{_HERE}.density.settings:qm9",
        f"{_HERE}.density.training",
    ),
    "physics-van-der-pol": Entry(
        "The Van der Pol oscillator by a physics-informed equilibrium model, in seconds.",
        f"{_HERE}.physics.settings:van_der_pol",
        f"{_HERE}.physics.solve_equation",
    ),
    "physics-four-tanks": Entry(
        "The four-tank process likewise.",
        f"{_HERE}.physics.settings:four_tanks",
        f"{_HERE}.physics.solve_equation",
    ),
    "physics-burgers": Entry(
        "Burgers' equation likewise, with second derivatives in space: a minute on a CPU.",
        f"{_HERE}.physics.settings:burgers",
        f"{_HERE}.physics.solve_equation",
    ),
    "physics-helmholtz": Entry(
        "Helmholtz' equation on the square likewise.",
        f"{_HERE}.physics.settings:helmholtz",
        f"{_HERE}.physics.solve_equation",
    ),
    "implicit-image": Entry(
        "A picture, your own too, as a field: an implicit representation, in minutes on a CPU.",
        f"{_HERE}.representations.settings:image",
        f"{_HERE}.representations.image:RUNNER",
    ),
    "implicit-image-generalization": Entry(
        "The same from a quarter of the pixels, tested on another quarter.",
        f"{_HERE}.representations.settings:generalization",
        f"{_HERE}.representations.image:RUNNER",
    ),
    "implicit-audio": Entry(
        "A sound, your own too, as a field of time: an implicit representation, in minutes on a CPU.",
        f"{_HERE}.representations.settings:audio",
        f"{_HERE}.representations.audio:RUNNER",
    ),
    "implicit-video": Entry(
        "A video, your own too, as a field of time and place, in minutes on a CPU.",
        f"{_HERE}.representations.settings:video",
        f"{_HERE}.representations.video:RUNNER",
    ),
    "implicit-shape": Entry(
        "A mesh, your own too, as a field of occupancy or signed distance, and the surface of that field.",
        f"{_HERE}.representations.settings:shape",
        f"{_HERE}.representations.shape:RUNNER",
    ),
    "jiio-generation-digits": Entry(
        "A generative equilibrium decoder without an encoder, trained by joint inference: the bundled digits.",
        f"{_HERE}.joint.settings:generation_digits",
        f"{_HERE}.joint.generation:RUNNER",
    ),
    "jiio-generation-mnist": Entry(
        "A generative equilibrium decoder without an encoder, trained by joint inference: MNIST.",
        f"{_HERE}.joint.settings:generation_mnist",
        f"{_HERE}.joint.generation:RUNNER",
    ),
    "jiio-generation-olivetti": Entry(
        "A generative equilibrium decoder without an encoder, trained by joint inference: the Olivetti faces.",
        f"{_HERE}.joint.settings:generation_olivetti",
        f"{_HERE}.joint.generation:RUNNER",
    ),
    "jiio-inverse-digits": Entry(
        "Denoising and inpainting by joint inference, trained exactly or first-order: the bundled digits.",
        f"{_HERE}.joint.settings:inverse_digits",
        f"{_HERE}.joint.inverse:RUNNER",
    ),
    "jiio-inverse-mnist": Entry(
        "Denoising and inpainting by joint inference, trained exactly or first-order: MNIST.",
        f"{_HERE}.joint.settings:inverse_mnist",
        f"{_HERE}.joint.inverse:RUNNER",
    ),
    "jiio-inverse-olivetti": Entry(
        "Denoising and inpainting by joint inference, trained exactly or first-order: the Olivetti faces.",
        f"{_HERE}.joint.settings:inverse_olivetti",
        f"{_HERE}.joint.inverse:RUNNER",
    ),
    "jiio-adversarial-digits": Entry(
        "An equilibrium classifier of the bundled digits trained against attacks found by joint inference.",
        f"{_HERE}.joint.settings:adversarial_digits",
        f"{_HERE}.joint.adversarial:RUNNER",
    ),
    "jiio-adversarial-mnist": Entry(
        "The same of MNIST, by a convolutional model, in minutes on a CPU.",
        f"{_HERE}.joint.settings:adversarial_mnist",
        f"{_HERE}.joint.adversarial:RUNNER",
    ),
    "jiio-meta-sinusoid": Entry(
        "Sine waves from ten points, by a context adapted through joint inference: half a minute on a CPU.",
        f"{_HERE}.joint.settings:sinusoid",
        f"{_HERE}.joint.meta:RUNNER",
    ),
    "jiio-meta-omniglot": Entry(
        "Five characters from one drawing of each (Omniglot), likewise: minutes on a CPU.",
        f"{_HERE}.joint.settings:omniglot",
        f"{_HERE}.joint.meta:RUNNER",
    ),
}
"""What ``train`` trains, in the order in which it is listed."""

TABLES = {
    "phantom-precision": Entry(
        "Phantom against exact gradients: their cosine over steps and damping, and along training (Figs. 1 and 2).",
        f"{_HERE}.phantom.precision:default",
        f"{_HERE}.phantom.precision:TABLE",
    ),
    "phantom-ablation": Entry(
        "An image classifier with implicit and phantom gradients: accuracy and cost (Table 1, Fig. 3).",
        f"{_HERE}.phantom.ablation:default",
        f"{_HERE}.phantom.ablation:TABLE",
    ),
    "phantom-language": Entry(
        "A language model with implicit and phantom gradients, and Jacobian regularization (Table 3).",
        f"{_HERE}.phantom.language_table:default",
        f"{_HERE}.phantom.language_table:TABLE",
    ),
    "phantom-graphs": Entry(
        "Implicit graph networks with implicit and phantom gradients, and long chains (Table 4).",
        f"{_HERE}.phantom.graphs_table:default",
        f"{_HERE}.phantom.graphs_table:TABLE",
    ),
    "implicit-generalization": Entry(
        "Pictures from a quarter of their pixels: implicit and explicit representations, three filters, three sizes.",
        f"{_HERE}.representations.generalization:default",
        f"{_HERE}.representations.generalization:TABLE",
    ),
    "implicit-gradients": Entry(
        "The PSNR of implicit representations over the products in their backward pass (Fig. 4).",
        f"{_HERE}.representations.gradients:default",
        f"{_HERE}.representations.gradients:TABLE",
    ),
    "implicit-signals": Entry(
        "A sound and a video by implicit and explicit representations: three filters, PSNR and cost.",
        f"{_HERE}.representations.signals:default",
        f"{_HERE}.representations.signals:TABLE",
    ),
    "implicit-shapes": Entry(
        "A mesh by implicit and explicit representations: occupancy, and distances with exact and one-step gradients.",
        f"{_HERE}.representations.shapes:default",
        f"{_HERE}.representations.shapes:TABLE",
    ),
    "physics-informed": Entry(
        "Physics-informed equilibrium models beside plain networks: four equations, three optimizers.",
        f"{_HERE}.physics.informed:default",
        f"{_HERE}.physics.informed:TABLE",
    ),
    "jiio-generation": Entry(
        "Joint inference beside nested optimization, loss against time; a decoder without an encoder beside a VAE.",
        f"{_HERE}.joint.generation_table:default",
        f"{_HERE}.joint.generation_table:TABLE",
    ),
    "jiio-inverse": Entry(
        "Denoising and inpainting by joint inference, with exact and first-order training gradients.",
        f"{_HERE}.joint.inverse_table:default",
        f"{_HERE}.joint.inverse_table:TABLE",
    ),
    "jiio-adversarial": Entry(
        "Adversarial training of an equilibrium model: attacks by joint inference beside PGD (JIIO, Table 5).",
        f"{_HERE}.joint.adversarial_table:default",
        f"{_HERE}.joint.adversarial_table:TABLE",
    ),
    "jiio-meta": Entry(
        "Meta-learning: a context by joint inference and by gradient descent, on sine waves and Omniglot (JIIO).",
        f"{_HERE}.joint.meta_table:default",
        f"{_HERE}.joint.meta_table:TABLE",
    ),
    "ofdft-gradients": Entry(
        "Gradients through a density functional's minimum: exact, damped, by propagation, and the adjoint's solvers.",
        f"{_HERE}.density.gradients:default",
        f"{_HERE}.density.gradients:TABLE",
    ),
    "ofdft-single": Entry(
        "One molecule's density functional by implicit differentiation and by propagation: loss and time.",
        f"{_HERE}.density.single:default",
        f"{_HERE}.density.single:TABLE",
    ),
    "ofdft-molecules": Entry(
        "Density functionals for several molecules, tested on new geometries and on new molecules of QM9.",
        f"{_HERE}.density.molecules:default",
        f"{_HERE}.density.molecules:TABLE",
    ),
    "ofdft-stability": Entry(
        "How hard densities are to find as their functional is trained, and what keeps it from growing harder.",
        f"{_HERE}.density.stability:default",
        f"{_HERE}.density.stability:TABLE",
    ),
}
"""What ``reproduce`` reproduces, likewise."""

PARTS = {
    "language-costs": Entry(
        "The cost of a step of trained language models, measured in turn.",
        f"{_HERE}.phantom.language_costs:default",
        f"{_HERE}.phantom.language_costs:RUNNER",
    ),
    "fields-cost": Entry(
        "The cost of a step of several fits of fields, measured in turn.",
        f"{_HERE}.representations.cost:default",
        f"{_HERE}.representations.cost:RUNNER",
    ),
    "implicit-shape-one-step": Entry(
        "A distance trained by the one-step estimate, which is wrong for it.",
        f"{_HERE}.representations.shapes:one_step",
        f"{_HERE}.representations.one_step:TRAINER",
    ),
    "implicit-shapes-cost": Entry(
        "The cost of a step of several fits of shapes, and where the one-step estimate points, measured in turn.",
        f"{_HERE}.representations.shapes:costs",
        f"{_HERE}.representations.one_step:COSTS",
    ),
    "jiio-adversarial-attacks": Entry(
        "Attacks on a classifier that was trained for it, measured in turn.",
        f"{_HERE}.joint.settings:attacks",
        f"{_HERE}.joint.adversarial:ATTACKS",
    ),
    "jiio-meta-adaptations": Entry(
        "Adaptations of a model that was trained for it, measured in turn.",
        f"{_HERE}.joint.settings:adaptations",
        f"{_HERE}.joint.meta:ADAPTATIONS",
    ),
    "ofdft-gradients-molecule": Entry(
        "Every gradient at one molecule's minimum, measured.",
        f"{_HERE}.density.settings:measurement",
        f"{_HERE}.density.adjoints:RUNNER",
    ),
    "ofdft-stability-training": Entry(
        "A training whose minimizations are counted at its start and its end, by two solvers.",
        f"{_HERE}.density.stability:training",
        f"{_HERE}.density.counted:RUNNER",
    ),
}
"""What tables run beside recipes. No command names them, and nothing lists them."""


def entry(name: str, among: dict[str, Entry] | None = None, kind: str = "recipe") -> Entry:
    """The entry of a name, among all or among some.

    Raises:
        UserError: if there is none.
    """
    known = {**RECIPES, **TABLES} if among is None else among
    if among is None and name in PARTS:
        return PARTS[name]
    if name in known:
        return known[name]
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see 'torchimplicit list'"
    raise UserError(f"there is no {kind} '{name}'; the {kind}s are {', '.join(known)}; {hint}")


def settings(name: str) -> Any:
    """The default settings of a recipe or table."""
    return _found(entry(name).settings)()


def runner(name: str) -> Runner:
    """What runs the settings of a recipe or table."""
    return cast("Runner", _found(entry(name).runner))


def _found(where: str) -> Any:
    module, _, name = where.partition(":")
    loaded = import_module(module)
    return getattr(loaded, name) if name else loaded
