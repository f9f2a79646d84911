"""Drop-in replacements for losses of MONAI, nnU-Net and segmentation_models_pytorch, with their
names and arguments, each in one pass over the voxels. None of these libraries is imported.
"""

import importlib

importlib.import_module("dice_core.torch")  # says how to install torch where it is missing
