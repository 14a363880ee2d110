"""What the panel keeps in the scene, so that it is saved and restored with it."""

from slicer import vtkMRMLMarkupsROINode, vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.parameterNodeWrapper import parameterNodeWrapper

__all__ = ["InvResSegmentParameterNode"]


@parameterNodeWrapper
class InvResSegmentParameterNode:
    """The choices of one scene; what belongs to the machine (device, folders) is in `Settings`.

    model: SHA-256 of the chosen model's weights, which is the same on every computer, or "".
    channels: channel name -> volume, for the channels that have one.
    baseModel: SHA-256 of the model to fine-tune, "" for the chosen one.
    outputSegmentation: where the result goes; None makes a new one. roi: None for the whole volume.
    """

    model: str
    baseModel: str
    channels: dict[str, vtkMRMLScalarVolumeNode]
    outputSegmentation: vtkMRMLSegmentationNode
    roi: vtkMRMLMarkupsROINode
