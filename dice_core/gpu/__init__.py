"""The CUDA kernels, from the plan of a launch to the driver.

- plan: the constants a kernel is compiled for, and the arguments of a launch.
- kernels: the frame of sums over the voxels and their gradient; plain: the common case in it,
  general: all others.
- blocks: the start and the end of a block.
- totals: adds the partial sums of blocks, and optionally computes a loss from the totals.
- intrinsics: operations of the kernels that numba.cuda lacks, as LLVM.
- compile: kernels to cubins. cache: cubins on disk. driver: loads and launches them.
- toolkit: the version of the CUDA toolkit that compiles.

`dice_core._gpu` is the backend that uses them.
"""
