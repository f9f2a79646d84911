"""A GPU that is emulated on the host, for tests: what is faked is NVIDIA's driver library, and the
device's arrays.

- `driver` stands for libcuda: it loads cubins and executes the PTX that they were linked from.
- `memory` allocates device memory, which is host memory between poisoned bytes.
- `arrays` are those of a library with the CUDA array interface.
- `tensors` are torch's CUDA tensors, for a torch that is built without CUDA.
- `device` puts all of them in place.

No memory of other libraries, no streams that run at the same time, no CUDA graphs.
"""

active = False  # whether it is in the place of a real one now
