"""How training images are synthesised, as configuration; the numbers are those of SynthSeg where it has them."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import InvresError

__all__ = ["LabelMapConfig", "SynthesisConfig"]


@dataclass(frozen=True)
class SynthesisConfig:
    """How images are synthesised (Billot et al., arXiv 2107.09559).

    Values marked as chosen are ours. The others are those of the authors' SynthSeg code as last published
    (`SynthSeg/training.py` and `scripts/tutorials/3-training.py`); its earlier revisions had scale 0.15,
    elastic_voxels 3 and bias_field 0.5.

    Space (lengths in voxels, which are 1 mm in the source): each axis scaled by 1 +- scale, rotated by
    +- rotation_degrees, sheared by +- shear; elastic displacement with a standard deviation up to elastic_voxels at
    control points elastic_spacing apart (source: the same, integrated as a velocity; here displacements
    themselves, limited so that they do not fold).
    Contrast (0..255): mean and standard deviation of each label uniform in the pairs given; blur_voxels is the
    largest sigma of the partial-volume blur (chosen; the source blurs with the acquisition only).
    Artefacts: bias_field (log factor at 4 control points per axis) up to this standard deviation; gamma exp(N(0,
    gamma_std^2)) (chosen; source: 0.5); with low_resolution_probability (chosen; source: nearly always) either
    voxels enlarged by up to low_resolution along all axes or slices thickened by up to thick_slices along one
    (chosen: alike often; the source prefers slices); noise_std up to this (chosen).
    Background (label 0; probabilities chosen): exactly zero, as after masking, or a texture like any other label,
    otherwise dark noisy air.

    groups: labels that share one contrast, for example left and right of a structure.
    tissues: groups of labels that look alike in most real contrasts (grey matter, white matter, fluid; chosen). With
    tissue_probability they are drawn around one mean for each, tissue_spread (standard deviation) apart; otherwise each
    label is drawn for itself.
    families: kinds of contrast (as T1, T2, FLAIR), each a pair for every group of tissues, between which its mean lies.
    One of them is taken where tissues are drawn as such; empty: the means of the tissues are any (`mean`).
    targets: labels that are returned; all others only shape the image and come back as 0. Empty: all.
    strip_probability: how often everything but the targets is removed from the image, as by skull stripping.
    tight_mask_probability: how often, where it is, the `fluid` around the brain is cut off, too, up to a random margin:
    masks of brains differ in that. What is cut off comes back as 0.
    """

    scale: float = 0.2
    rotation_degrees: float = 15.0
    shear: float = 0.012
    elastic_voxels: float = 4.0
    elastic_spacing: float = 25.0
    mean: tuple[float, float] = (25.0, 225.0)
    std: tuple[float, float] = (5.0, 25.0)
    blur_voxels: float = 0.7
    bias_field: float = 0.7
    gamma_std: float = 0.4
    low_resolution_probability: float = 0.75
    low_resolution: float = 4.0
    thick_slices: float = 8.0
    noise_std: float = 10.0
    zero_background_probability: float = 0.4
    textured_background_probability: float = 0.2
    groups: tuple[tuple[int, ...], ...] = ()
    tissues: tuple[tuple[int, ...], ...] = ()
    tissue_probability: float = 0.0
    tissue_spread: float = 12.0
    families: tuple[tuple[tuple[float, float], ...], ...] = ()
    targets: tuple[int, ...] = ()
    strip_probability: float = 0.0
    tight_mask_probability: float = 0.0
    fluid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.scale < 1:
            raise InvresError(f"synthesis.scale must be between 0 and 1, got {self.scale}.")
        if self.elastic_spacing < 1:
            raise InvresError(f"synthesis.elastic_spacing must be 1 voxel or more, got {self.elastic_spacing}.")
        if min(self.low_resolution, self.thick_slices) < 1:
            raise InvresError(
                "synthesis.low_resolution and thick_slices are factors of 1 or more, "
                f"got {self.low_resolution} and {self.thick_slices}."
            )
        for name, (low, high) in (("mean", self.mean), ("std", self.std)):
            if not 0 <= low <= high:
                raise InvresError(f"synthesis.{name} must be two numbers from 0 up, low then high, got {[low, high]}.")


@dataclass(frozen=True)
class LabelMapConfig:
    """How label maps become training images. What is in no label of the scheme only shapes them.

    same_contrast: groups of values that are the same tissue. Empty: the mirrored pairs are.
    similar: values that look alike in most real contrasts, see `SynthesisConfig.tissues`.
    mirrored: pairs of values, left and right of a structure, that change places when the head is mirrored from left to
    right. Empty: nothing is mirrored.
    fluid: values of the fluid around the brain, see `SynthesisConfig.tight_mask_probability`.
    finer: voxels of the map along each axis of one image voxel.
    beginning: for so many iterations, `beginning_iterations`, images are synthesised as this says, which ought to be
    easier (fewer kinds of contrast, less noise): a network that is shown everything at once learns slowly at first.
    gain, offset: images are standardised in the patch, but as a whole when a volume is segmented; the difference is
    made up for by a random factor exp(u), u uniform in +- gain, and a random summand uniform in +- offset.
    """

    same_contrast: tuple[tuple[int, ...], ...] = ()
    similar: tuple[tuple[int, ...], ...] = ()
    mirrored: tuple[tuple[int, int], ...] = ()
    fluid: tuple[int, ...] = ()
    finer: int = 1
    gain: float = 0.15
    offset: float = 0.2
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    beginning: SynthesisConfig | None = None
    beginning_iterations: int = 0

    def __post_init__(self) -> None:
        if (self.beginning is not None) != (self.beginning_iterations > 0):
            raise InvresError("label_maps.beginning and beginning_iterations must be given together, or neither.")
        for name, synthesis in (("synthesis", self.synthesis), ("beginning", self.beginning)):
            if synthesis is not None:
                self._check(name, synthesis)
        if self.finer < 1:
            raise InvresError(f"label_maps.finer must be 1 or more, got {self.finer}.")

    def _check(self, name: str, synthesis: SynthesisConfig) -> None:
        if synthesis.groups or synthesis.tissues or synthesis.targets or synthesis.fluid:
            raise InvresError(
                f"label_maps.{name} must leave groups, tissues, targets and fluid empty.",
                hint="Use same_contrast, similar and fluid of label_maps instead; the targets are the recipe's labels.",
            )
        if synthesis.tight_mask_probability and not self.fluid:
            raise InvresError(
                f"label_maps.{name} has a tight_mask_probability, but label_maps.fluid does not say what is cut off.",
                hint="List the values of the fluid around the brain there.",
            )
        if any(len(family) != len(self.similar) for family in synthesis.families):
            raise InvresError(
                f"Each of label_maps.{name}.families must have "
                f"one pair for each of the {len(self.similar)} groups of label_maps.similar."
            )
