"""The CUDA kernels, from the plan of a launch to the driver.

- plan: the constants a kernel is compiled for, and the arguments of a launch.
- kernels, general: sums over the voxels and their gradient; softmax of labels, everything else.
- blocks: what the two have in common at the start and the end of a block.
- totals: adds up what blocks have summed, and goes on to a loss.
- intrinsics: operations of the kernels that numba.cuda lacks, as LLVM.
- compile: kernels to cubins. cache: cubins on disk. driver: loads and launches them.

`dice_core._gpu` is the backend that uses them.
"""
