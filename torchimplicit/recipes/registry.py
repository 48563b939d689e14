"""The recipes and tables by name. Looking one up imports only that one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from torchimplicit.recipes.runtime.errors import UserError, meant

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Runner


@dataclass(frozen=True)
class Entry:
    """Location of a recipe or table.

    Attributes:
        module: below :mod:`torchimplicit.recipes`; it imports nothing heavy.
        settings: what in it gives the default settings: a function, or their class.
        runner: the :class:`Runner` of such settings in it, ``module:name`` elsewhere, or empty for the module itself.
        summary: one line for ``torchimplicit list``.
    """

    module: str
    settings: str
    runner: str
    summary: str


RECIPES = {
    "demo": Entry("phantom.demo", "demo", "",
        "Three gradient estimators side by side on 8×8 digits, with pictures, in under three minutes."),
    "digits": Entry("phantom.demo", "digits", "",
        "One convolutional equilibrium classifier of 8×8 digits, with the estimator of your choice."),
    "language-python": Entry("phantom.language", "python", "RUNNER",
        "A small DEQ transformer that writes like Python's manual, in minutes on a CPU, without a download."),
    "language-wikitext2": Entry("phantom.language", "wikitext2", "RUNNER",
        "A small DEQ transformer on WikiText-2, or a text of your own, minutes on a CPU."),
    "language-wikitext103": Entry("phantom.language", "wikitext103", "RUNNER",
        "The DEQ transformer of the papers (98M parameters) on WikiText-103, for GPUs."),
    "images-digits": Entry("phantom.images", "digits", "RUNNER",
        "A small multiscale equilibrium model (MDEQ) on the bundled digits, in seconds."),
    "images-mnist": Entry("phantom.images", "mnist", "RUNNER",
        "A small MDEQ on MNIST, in minutes on a CPU."),
    "images-folder": Entry("phantom.images", "own", "RUNNER",
        "A small MDEQ on your own images, one folder per class, of any size."),
    "images-cifar10": Entry("phantom.images", "cifar10", "RUNNER",
        "MDEQ-Tiny on CIFAR-10 with the published settings."),
    "images-cifar10-large": Entry("phantom.images", "cifar10_large", "RUNNER",
        "MDEQ-Large on CIFAR-10 with the published settings."),
    "images-imagenet": Entry("phantom.images", "imagenet", "RUNNER",
        "MDEQ-Small on ImageNet with the published settings."),
    "images-cost": Entry("phantom.images", "costs", "COSTS",
        "Cost of a training step of an image model with each gradient, timed in turn at the same weights."),
    "graphs-cox2": Entry("phantom.graphs", "cox2", "RUNNER",
        "IGNN on a fold of COX2 (467 molecules) with the published settings."),
    "graphs-proteins": Entry("phantom.graphs", "proteins", "RUNNER",
        "IGNN on a fold of PROTEINS (1113 graphs) with the published settings."),
    "graphs-tu": Entry("phantom.graphs", "tu", "RUNNER",
        "IGNN on a fold of any set in the TU collection's format, including your own."),
    "graphs-folds": Entry("phantom.folds", "folds", "FOLDS",
        "IGNN on every fold of a TU set, with the accuracy on each and their mean."),
    "graphs-nodes": Entry("phantom.nodes", "nodes", "RUNNER",
        "IGNN that classifies the nodes of your own graph, from an .npz file or two tables."),
    "graphs-ppi": Entry("phantom.graphs", "ppi", "RUNNER",
        "IGNN on PPI (24 graphs, 121 labels a node) with the published settings, for GPUs."),
    "graphs-chains": Entry("phantom.graphs", "chains", "RUNNER",
        "IGNN on directed chains whose first node alone carries the class, in a minute or two on a CPU."),
    "graphs-cost": Entry("phantom.graphs", "cost", "COSTS",
        "Cost of a step with each gradient on COX2 or PROTEINS, timed in turn at the same weights."),
    "phantom-layer": Entry("phantom.layer", "layer", "LAYER",
        "Phantom and exact gradients of a random layer, over steps and damping, in seconds."),
    "phantom-training": Entry("phantom.layer", "training", "TRAINING",
        "An image classifier whose gradient is compared with many estimators during training."),
    "ofdft-small": Entry("density.settings", "small", "density.training:",
        "An orbital-free density functional for H2, H2O, NH3 and CH4, trained by its minima, in minutes."),
    "ofdft-one": Entry("density.settings", "single", "density.training:",
        "An orbital-free density functional for one molecule, by implicit differentiation or equilibrium propagation."),
    "ofdft-qm9": Entry("density.settings", "qm9", "density.training:",
        "An orbital-free density functional for the smallest molecules of QM9, some held out."),
    "physics-van-der-pol": Entry("physics.solve_equation", "van_der_pol", "",
        "The Van der Pol oscillator by a physics-informed equilibrium model, in seconds."),
    "physics-four-tanks": Entry("physics.solve_equation", "four_tanks", "",
        "The four-tank process by a physics-informed equilibrium model, in seconds."),
    "physics-burgers": Entry("physics.solve_equation", "burgers", "",
        "Burgers' equation by a physics-informed equilibrium model: a minute on a CPU."),
    "physics-helmholtz": Entry("physics.solve_equation", "helmholtz", "",
        "Helmholtz' equation on a square by a physics-informed equilibrium model: a minute on a CPU."),
    "physics-slowness": Entry("physics.solve_equation", "slowness", "",
        "The slowness of a medium from waves measured in it, a field found with the waves: a minute on a CPU."),
    "physics-equation": Entry("physics.solve_equation", "own", "",
        "Your own equation, from a Python file; its unknown parameters are estimated with the solution."),
    "operator-darcy": Entry("physics.operator", "darcy", "RUNNER",
        "Steady Darcy flow by an equilibrium neural operator, or an explicit counterpart, on generated flows."),
    "reasoning-sudoku": Entry("reasoning.sudoku", "sudoku", "reasoning.solving:RUNNER",
        "Sudoku of 4, 6 or 9 digits by a small weight-tied network, on generated puzzles."),
    "reasoning-maze": Entry("reasoning.maze", "maze", "reasoning.solving:RUNNER",
        "The shortest path through generated mazes by a small weight-tied network."),
    "reasoning-sudoku-trm": Entry("reasoning.sudoku", "as_published", "reasoning.solving:RUNNER",
        "Sudoku of 9 digits with the published settings of the tiny recursive model, for GPUs."),
    "reasoning-maze-trm": Entry("reasoning.maze", "as_published", "reasoning.solving:RUNNER",
        "Mazes of 30 × 30 with the published settings of the tiny recursive model, for GPUs."),
    "implicit-image": Entry("representations.image", "image", "RUNNER",
        "A picture, yours or built-in, as an implicit representation, in minutes on a CPU."),
    "implicit-image-generalization": Entry("representations.image", "generalization", "RUNNER",
        "A picture as an implicit representation from a quarter of its pixels, tested on another quarter."),
    "implicit-audio": Entry("representations.audio", "audio", "RUNNER",
        "A sound, yours or built-in, as an implicit representation, in minutes on a CPU."),
    "implicit-video": Entry("representations.video", "video", "RUNNER",
        "A video, yours or built-in, as an implicit representation, in minutes on a CPU."),
    "implicit-shape": Entry("representations.shape", "shape", "RUNNER",
        "A mesh, yours or built-in, as a field of occupancy or signed distance, and that field's surface."),
    "jiio-generation-digits": Entry("joint.generation", "generation_digits", "RUNNER",
        "A generative equilibrium decoder without an encoder, trained by joint inference: the bundled digits."),
    "jiio-generation-mnist": Entry("joint.generation", "generation_mnist", "RUNNER",
        "A generative equilibrium decoder without an encoder, trained by joint inference: MNIST."),
    "jiio-generation-olivetti": Entry("joint.generation", "generation_olivetti", "RUNNER",
        "A generative equilibrium decoder without an encoder, trained by joint inference: the Olivetti faces."),
    "jiio-generation-images": Entry("joint.generation", "generation_images", "OWN",
        "A generative decoder of your own pictures (--images FOLDER): a prior for 'torchimplicit restore'."),
    "jiio-inverse-digits": Entry("joint.inverse", "inverse_digits", "RUNNER",
        "Denoising and inpainting by joint inference, trained exactly or first-order: the bundled digits."),
    "jiio-inverse-mnist": Entry("joint.inverse", "inverse_mnist", "RUNNER",
        "Denoising and inpainting by joint inference, trained exactly or first-order: MNIST."),
    "jiio-inverse-olivetti": Entry("joint.inverse", "inverse_olivetti", "RUNNER",
        "Denoising and inpainting by joint inference, trained exactly or first-order: the Olivetti faces."),
    "jiio-adversarial-digits": Entry("joint.adversarial", "adversarial_digits", "RUNNER",
        "An equilibrium classifier of the bundled digits trained against attacks found by joint inference."),
    "jiio-adversarial-mnist": Entry("joint.adversarial", "adversarial_mnist", "RUNNER",
        "Adversarial training of a convolutional equilibrium classifier on MNIST, in minutes on a CPU."),
    "jiio-adversarial-mdeq": Entry("joint.adversarial", "adversarial_mdeq", "RUNNER",
        "Adversarial training of an MDEQ on the digits, MNIST or CIFAR-10 (--data), in minutes on a CPU."),
    "jiio-meta-sinusoid": Entry("joint.meta", "sinusoid", "RUNNER",
        "Sine waves from ten points, by a context adapted through joint inference: half a minute on a CPU."),
    "jiio-meta-omniglot": Entry("joint.meta", "omniglot", "RUNNER",
        "Five characters from one drawing of each (Omniglot), by an adapted context: minutes on a CPU."),
}  # fmt: skip
"""The recipes of ``train``, in the order of the list."""

TABLES = {
    "phantom-precision": Entry("phantom.precision", "PrecisionConfig", "TABLE",
        "Phantom against exact gradients: their cosine over steps and damping, and during training (Figs. 1 and 2)."),
    "phantom-ablation": Entry("phantom.ablation", "PhantomAblationConfig", "TABLE",
        "An image classifier with implicit and phantom gradients: accuracy and cost (Table 1, Fig. 3)."),
    "phantom-language": Entry("phantom.language_table", "PhantomLanguage", "TABLE",
        "A language model with implicit and phantom gradients, and Jacobian regularization (Table 3)."),
    "looped-language": Entry("phantom.looped_language", "LoopedLanguageConfig", "TABLE",
        "A fixed-point language model beside looped and stacked twins: perplexity over evaluations at test time."),
    "phantom-graphs": Entry("phantom.graphs_table", "PhantomGraphsConfig", "TABLE",
        "Implicit graph networks with implicit and phantom gradients, and long chains (Table 4)."),
    "implicit-generalization": Entry("representations.generalization", "GeneralizationConfig", "TABLE",
        "Pictures from a quarter of their pixels: implicit and explicit representations, three filters, three sizes."),
    "implicit-gradients": Entry("representations.gradients", "GradientsConfig", "TABLE",
        "The PSNR of implicit representations over the products in their backward pass (Fig. 4)."),
    "implicit-signals": Entry("representations.signals", "SignalsConfig", "TABLE",
        "A sound and a video by implicit and explicit representations: three filters, PSNR and cost."),
    "implicit-shapes": Entry("representations.shapes", "ShapesConfig", "TABLE",
        "A mesh by implicit and explicit representations: occupancy, and distances with exact and one-step gradients."),
    "physics-informed": Entry("physics.informed", "PhysicsInformedConfig", "TABLE",
        "Physics-informed equilibrium models against plain networks: four equations, three optimizers."),
    "physics-inverse": Entry("physics.inverse", "PhysicsInverseConfig", "TABLE",
        "Parameters of differential equations, built-in or yours, from noisy values, with error bars over seeds."),
    "reasoning-gradients": Entry("reasoning.gradients", "ReasoningGradientsConfig", "TABLE",
        "Small reasoning models on Sudoku with seven gradients: accuracy, cosine to the exact gradient, and cost."),
    "jiio-generation": Entry("joint.generation", "JiioGenerationConfig", "TABLE",
        "Joint inference against nested optimization, and a decoder without an encoder against a VAE."),
    "jiio-inverse": Entry("joint.inverse", "JiioInverseConfig", "TABLE",
        "Denoising and inpainting by joint inference, with exact and first-order training gradients."),
    "jiio-adversarial": Entry("joint.adversarial", "AdversarialTableConfig", "TABLE",
        "Adversarial training of an equilibrium model: attacks by joint inference and PGD (JIIO, Table 5)."),
    "jiio-meta": Entry("joint.meta", "MetaTableConfig", "TABLE",
        "Meta-learning: a context by joint inference and by gradient descent, on sine waves and Omniglot (JIIO)."),
    "ofdft-gradients": Entry("density.gradients", "TableConfig", "TABLE",
        "Gradients through a density functional's minimum: exact, damped, by propagation; adjoint solvers."),
    "ofdft-single": Entry("density.single", "SingleConfig", "TABLE",
        "One molecule's density functional by implicit differentiation and by propagation: loss and time."),
    "ofdft-molecules": Entry("density.molecules", "MoleculesConfig", "TABLE",
        "Density functionals for several molecules, tested on new geometries and on new molecules of QM9."),
    "ofdft-finetune": Entry("density.finetuning", "FinetuneConfig", "TABLE",
        "Density functionals pre-trained and then fine-tuned by their minima: does it help, and is it stable?"),
    "ofdft-cost": Entry("density.cost", "CostConfig", "TABLE",
        "Cost of a density from a functional and from a Kohn-Sham calculation, as molecules grow."),
    "ofdft-stability": Entry("density.stability", "StabilityConfig", "TABLE",
        "How the effort to find densities grows as a functional is trained, and what limits it."),
}  # fmt: skip
"""The tables of ``reproduce``, in the order of the list."""

PARTS = {
    "pretrain": Entry("density.learning_settings", "Pretraining", "density.pretrain:",
        "Train a density functional on Kohn-Sham calculations, without minimizing it."),
    "ofdft-schooling": Entry("density.learning_settings", "Schooling", "density.schooling:",
        "A pre-training of a density functional, and several ways to go on from its weights."),
    "finetune": Entry("density.learning_settings", "Finetuning", "density.finetune:",
        "Fine-tune a pre-trained density functional on the densities at its minima."),
    "language-costs": Entry("phantom.language", "costs", "COSTS",
        "The cost of a step of trained language models, measured in turn."),
    "looped-language-curves": Entry("phantom.looped_language", "CurvesConfig", "MEASURING",
        "The perplexity of trained language models over evaluations at test time."),
    "fields-cost": Entry("representations.cost", "default", "RUNNER",
        "The cost of a step of several fits of fields, measured in turn."),
    "implicit-shape-one-step": Entry("representations.shapes", "one_step", "ONE_STEP",
        "A distance trained by the one-step estimate, which is wrong for it."),
    "implicit-shapes-cost": Entry("representations.shapes", "costs", "COSTS",
        "The cost of a step of several fits of shapes, and where the one-step estimate points, measured in turn."),
    "jiio-adversarial-attacks": Entry("joint.adversarial", "attacks", "ATTACKS",
        "Attacks on a classifier that was trained for it, measured in turn."),
    "jiio-meta-adaptations": Entry("joint.meta", "adaptations", "ADAPTATIONS",
        "Adaptations of a model that was trained for it, measured in turn."),
    "reasoning-sudoku-cost": Entry("reasoning.gradients", "PuzzleCostConfig", "MEASURING",
        "The cost of a training step on Sudoku with every gradient, measured in turn."),
    "ofdft-gradients-molecule": Entry("density.gradient_figures", "MoleculeGradientsConfig", "density.adjoints:",
        "Every gradient at one molecule's minimum, measured."),
    "ofdft-cost-molecule": Entry("density.cost", "MeasurementConfig", "RUNNER",
        "The cost of one molecule's density, and of its Kohn-Sham calculation."),
    "ofdft-stability-training": Entry("density.stability", "CountedTraining", "density.counted:",
        "A training whose minimizations are counted at its start and its end, by two solvers."),
}  # fmt: skip
"""Further recipes that tables run. ``train`` does not accept their names and no list shows them; some are commands."""


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
    hint = meant(name, known) or f"'torchimplicit list' shows all {kind}s"
    raise UserError(f"there is no {kind} '{name}'; {hint}")


def settings(name: str) -> Any:
    """The default settings of a recipe or table."""
    one = entry(name)
    return getattr(_module(one.module), one.settings)()


def runner(name: str) -> Runner:
    """Return what runs the settings of a recipe or table."""
    one = entry(name)
    module, _, function = one.runner.rpartition(":")
    loaded = _module(module or one.module)
    return cast("Runner", getattr(loaded, function) if function else loaded)


def _module(name: str) -> Any:
    return import_module(f"torchimplicit.recipes.{name}")
