"""An equilibrium classifier in Lightning, with the solver's figures logged like other metrics.

The layer is an ordinary module, so Lightning's gradient clipping, checkpoints and multi-device training work
as usual. The log also contains the number of steps and the share of samples that did not converge, which
should be monitored in training. Trained on the 8×8 digits of scikit-learn.
"""

import csv
import logging
import sys
import tempfile
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchimplicit as ti

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
for known in (".*does not have many workers.*", ".*treespec, LeafSpec.*"):  # of Lightning's own
    warnings.filterwarnings("ignore", message=known)


class Cell(nn.Module):
    """`z = tanh(W * z + U * x)` with a convolution W of norm below one, at most three times that of its 3×3 kernel."""

    def __init__(self, channels: int):
        super().__init__()
        self.hidden = ti.nn.spectral_norm(nn.Conv2d(channels, channels, 3, padding=1), bound=0.95 / 3)
        self.inject = nn.Conv2d(1, channels, 3, padding=1)

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), self.inject.out_channels, *x.shape[2:])

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.hidden(z) + self.inject(x))


class Classifier(L.LightningModule):
    def __init__(self, channels: int = 16):
        super().__init__()
        self.layer = ti.nn.Equilibrium(Cell(channels), solver=ti.Anderson(rtol=1e-3, max_steps=20), rowwise=True)
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * channels, 10))

    def step(self, batch: list[torch.Tensor], stage: str) -> torch.Tensor:
        x, y = batch
        scores = self.head(self.layer(x))
        loss = nn.functional.cross_entropy(scores, y)
        figures = {
            "loss": loss,
            "accuracy": (scores.argmax(1) == y).float().mean(),
            "steps": self.layer.solution.steps.float().mean(),
            "unconverged": (~self.layer.solution.converged).float().mean(),
        }
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.step(batch, "validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


L.seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target))
train, validation = torch.utils.data.random_split(data, [1400, 397])
with tempfile.TemporaryDirectory() as folder:
    logger, checkpoint = CSVLogger(folder), ModelCheckpoint(monitor="validation/accuracy", mode="max")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=6, log_every_n_steps=10, logger=logger, callbacks=[checkpoint], **quiet)
    trainer.fit(Classifier(), DataLoader(train, batch_size=50, shuffle=True), DataLoader(validation, batch_size=397))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        lines = list(csv.DictReader(file))
curves = {name: [float(line[name]) for line in lines if line[name]] for name in lines[0]}
for epoch in range(6):
    told = {name: f"{curves[f'validation/{name}'][epoch]:.3f}" for name in ("accuracy", "steps", "unconverged")}
    print(f"epoch {epoch + 1}:", *(f"{name} {value}" for name, value in told.items()))
print(f"the checkpoint kept was right on {checkpoint.best_model_score:.1%}")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy", "steps"), strict=True):
        for stage in ("train", "validation"):
            axis.plot(range(1, 7), curves[f"{stage}/{name}"], label=stage)
        axis.set(xlabel="epoch", ylabel=name)
    axes[0].legend()
    figure.savefig(sys.argv[1], dpi=120)
