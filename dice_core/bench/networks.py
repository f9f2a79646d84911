"""The networks of whole training steps, by name: of so many classes, and then of a patch's side.

Each is as deep as its patch allows, until the deepest feature map has sides of 4 to 7 voxels, or an
odd number. Its weights are the same on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and the networks' packages are imported on use: --help needs none of them
    from torch.nn import Module

Build = Callable[[int], "Module"]  # side -> network


def plain_conv_unet(classes: int, fused: bool = False) -> Build:
    """nnU-Net's PlainConvUNet as nnU-Net plans it, without deep supervision; with a LinearHead in
    place of its last layer, a 1x1x1 convolution, if `fused`.
    """
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import manual_seed, nn

    from ..torch import LinearHead

    def build(side: int) -> Module:
        manual_seed(0)
        levels = _levels(side)
        net: Any = PlainConvUNet(
            input_channels=1,
            n_stages=levels,
            features_per_stage=[min(32 * 2**level, 320) for level in range(levels)],
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=[1] + [2] * (levels - 1),
            n_conv_per_stage=2,
            num_classes=classes,
            n_conv_per_stage_decoder=2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
        if fused:
            heads = net.decoder.seg_layers
            heads[-1] = LinearHead(heads[-1])
        return net

    return build


def monai_unet(classes: int) -> Build:
    """MONAI's UNet with residual units, whose last layers, at full resolution, have as many
    channels as there are classes: the last one is no 1x1x1 convolution.
    """
    from monai.networks.nets import UNet
    from torch import manual_seed

    def build(side: int) -> Module:
        manual_seed(0)
        levels = _levels(side)
        channels = [16 * 2**level for level in range(levels)]
        return UNet(3, 1, classes, channels, [2] * (levels - 1), num_res_units=2)

    return build


NETWORKS: dict[str, Callable[[int], Build]] = {
    "nnunet-step": plain_conv_unet,
    "monai-step": monai_unet,
}
TITLES = {"nnunet-step": "PlainConvUNet", "monai-step": "MONAI's UNet"}


def _levels(side: int) -> int:
    levels = 1
    while side % 2 == 0 and side >= 8:
        levels, side = levels + 1, side // 2
    return levels
