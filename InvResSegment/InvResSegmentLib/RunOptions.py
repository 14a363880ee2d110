"""What a person asks of a fine-tuning, and the command line that says it to the backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slicer.i18n import tr as _

__all__ = ["DROPOUT", "FROZEN", "MEMORY", "PATIENCE", "RunOptions", "proofSentence"]

MEMORY = ("low", "lower", "lowest")
"""The backend's settings, from the fastest to the one that needs least memory."""
FROZEN = ("none", "encoder", "all-but-head")
PATIENCE = 20
"""Epochs without a better Dice after which the backend ends a training where nothing else is asked for."""
DROPOUT = 0.25
"""How often each channel is blanked in training, so that the model learns to do without (chosen)."""
FEW = 10  # patients up to which the backend holds out each one
GROUPS = 5


@dataclass(frozen=True)
class RunOptions:
    """minutes: of all trainings together, 0 for no limit; epochs: of each, 0 for the backend's own number.

    vae: None as the base model has it. synthetic: fraction of the batches. learningRate: 0 for the backend's own.
    baseCases: a data set to see what is forgotten of, or "". patience: epochs without a better Dice, 0 to go on.
    channelDropout: above 0 the model learns to do without some channels; 0 leaves that as the base model has it.
    """

    minutes: float = 30.0
    epochs: int = 0
    memory: str = "low"
    freeze: str = "none"
    synthetic: float = 0.0
    vae: bool | None = None
    learningRate: float = 0.0
    name: str = ""
    baseCases: str = ""
    device: str = "auto"
    patience: int = PATIENCE
    channelDropout: float = 0.0

    def arguments(self, model: str, data: str | Path, folder: str | Path) -> list[str]:
        """The backend's command line; the same one with --resume goes on with the run in `folder`."""
        words = ["finetune", "--model", str(model), "--data", str(data), "--output", str(folder)]
        words += ["--device", self.device, "--memory", self.memory, "--freeze", self.freeze]
        # A person has said of every name what it stands for, so labels that are all new are meant.
        words.append("--new-labels")
        if self.minutes:
            words += ["--time", f"{60 * self.minutes:.0f}s"]
        if self.epochs:
            words += ["--epochs", str(self.epochs)]
        if self.patience != PATIENCE:
            words += ["--patience", str(self.patience)]
        if self.channelDropout:
            words += ["--channel-dropout", f"{self.channelDropout:g}"]
        if self.synthetic:
            words += ["--synthetic", f"{self.synthetic:.2f}"]
        if self.learningRate:
            words += ["--lr", f"{self.learningRate:g}"]
        if self.vae is not None:
            words.append("--vae" if self.vae else "--no-vae")
        if self.name:
            words += ["--name", self.name]
        if self.baseCases:
            words += ["--check-base", self.baseCases]
        return words

    def planArguments(self, model: str) -> list[str]:
        """The question what a step of this will need."""
        words = ["plan", "--training", "--model", str(model), "--memory", self.memory, "--device", self.device]
        if self.vae is not None:
            words.append("--vae" if self.vae else "--no-vae")
        return words


def proofSentence(patients: int, heldOut: int) -> str:
    """How the tuned model will be proved. patients: all that take part; heldOut: those with the role validation."""
    if heldOut:
        return _("Held out for the proof: {count}. The model does not learn from what is held out.").format(
            count=heldOut
        )
    if patients == 1:
        return _("One patient alone can prove nothing: add cases of others to see whether the model got better.")
    if patients <= FEW:
        count = min(patients, GROUPS) + 1
        return _(
            "{count} trainings share the time: each patient is held out once for the proof; the last learns from all."
        ).format(count=count)
    return _("A quarter of the {count} patients is held out for the proof.").format(count=patients)
