"""Losses of MONAI, nnU-Net and segmentation_models_pytorch by their names and arguments, each in
one pass over the voxels. They import none of these libraries.
"""

import importlib

importlib.import_module("dice_core.torch")  # says how to install torch where it is missing
