"""What runs the graph recipes. torch-geometric is imported when it is known to be there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torchimplicit.recipes.graphs.config import ChainsConfig, MoleculesConfig, PPIConfig
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.task import Task
from torchimplicit.recipes.runtime.trainer import Trainer


def build(config: Any) -> Task:
    """The task of the settings."""
    from torchimplicit.recipes.graphs.chains_task import ChainsTask
    from torchimplicit.recipes.graphs.molecules_task import MoleculesTask
    from torchimplicit.recipes.graphs.ppi_task import PPITask

    kinds: dict[type, Callable[[Any], Task]] = {
        MoleculesConfig: MoleculesTask,
        PPIConfig: PPITask,
        ChainsConfig: ChainsTask,
    }
    return kinds[type(config)](config)


def ready(config: Any) -> None:
    """Raise :class:`UserError` where torch-geometric is missing, or the folder that is given is the wrong one."""
    if find_spec("torch_geometric") is None:
        raise UserError("this recipe needs torch-geometric: pip install 'torchimplicit[graphs]'")
    from torchimplicit.recipes.graphs import chains, ppi, tu

    if isinstance(config, ChainsConfig):
        chains.chains(config.length, config.optimization.seed)
    elif isinstance(config, PPIConfig) and config.data_dir is not None:
        ppi.locate(config.data_dir)
    elif isinstance(config, MoleculesConfig) and config.data_dir is not None:
        tu.locate(config.data, config.data_dir)


TRAINER = Trainer(build, ready)
