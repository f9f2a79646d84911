"""buffers: address and layout of arrays of any library, without copying them."""

import array
import contextlib
import ctypes
import gc
import struct
import sys
import weakref
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from dice_core import allocators, buffers

BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def readonly(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def cuda_array(shape=(2, 3), typestr="<f4", address=4096, **more):
    """A CUDA array whose memory is never accessed."""
    interface = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=interface | more)


def dlpack(a, device=None):
    class Exporter:  # NumPy 1.26 looks for the methods on the type
        def __dlpack__(self, **options):
            return a.__dlpack__(**options)

        def __dlpack_device__(self):
            return a.__dlpack_device__() if device is None else device

    return Exporter()


def array_interface(a):
    return SimpleNamespace(owner=a, __array_interface__=a.__array_interface__)


WRAPPERS = {
    "numpy": lambda a: a,
    "torch": torch.from_numpy,
    "dlpack": dlpack,
    "array_interface": array_interface,
    "memoryview": memoryview,
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


# ---- NumPy -------------------------------------------------------------------------------------

NUMPY = {
    "c_order": BASE,
    "fortran_order": np.asfortranarray(BASE),
    "negative_strides": BASE[::-1, :, ::-1],
    "sliced": BASE[:, 1:, ::2],
    "transposed": BASE.transpose(2, 0, 1),
    "broadcast": np.broadcast_to(BASE[:, :, :1], BASE.shape),
    "readonly": readonly(BASE),
    "no_elements": np.empty((2, 3, 0), np.float32),
    "no_spatial_axes": BASE[0],
    "no_axes": np.array(1.0),
    **{name: np.ones(3, name) for name in ("float16", "float64", "int8", "uint64", "bool")},
}


@pytest.mark.parametrize("a", NUMPY.values(), ids=NUMPY)
def test_numpy(a):
    buffer = buffers.of(a, "x")
    assert (buffer.shape, buffer.strides) == (a.shape, a.strides)
    assert (buffer.dtype, buffer.itemsize) == (a.dtype.name, a.dtype.itemsize)
    assert (buffer.device, buffer.stream) == ("cpu", None)
    assert buffer.readonly == (not a.flags.writeable)
    assert buffer.owner is a


@pytest.mark.parametrize("a", NUMPY.values(), ids=NUMPY)
def test_numpy_views_a_buffer(a):
    view = np.asarray(buffers.of(a, "x"))
    np.testing.assert_array_equal(view, a, strict=True)
    assert view.strides == a.strides
    assert view.flags.writeable == a.flags.writeable
    if a.size:
        assert view.ctypes.data == a.ctypes.data


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_memmap(tmp_path, mode):
    BASE.tofile(tmp_path / "x")
    a = np.memmap(tmp_path / "x", np.float32, mode, shape=BASE.shape)
    buffer = buffers.of(a, "x")
    assert (buffer.address, buffer.strides) == (a.ctypes.data, BASE.strides)
    assert buffer.readonly == (mode == "r")
    np.testing.assert_array_equal(np.asarray(buffer), BASE)


# ---- torch -------------------------------------------------------------------------------------

TORCH_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
TORCH = {
    "contiguous": torch.zeros(2, 3, 4, 5),
    "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sliced": torch.zeros(2, 3, 9)[:, 1:, ::2],
    "transposed": torch.zeros(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.zeros(2, 3, 1).expand(2, 3, 4),
    "requires_grad": torch.zeros(2, 3, requires_grad=True),
    "no_elements": torch.zeros(2, 3, 0),
    "no_axes": torch.tensor(1.0),
}


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_torch_dtype(name):
    tensor = torch.zeros(2, 3, dtype=getattr(torch, name))
    buffer = buffers.of(tensor, "x")
    assert (buffer.dtype, buffer.itemsize) == (name, tensor.itemsize)
    assert buffer.strides == (3 * tensor.itemsize, tensor.itemsize)


@pytest.mark.parametrize("tensor", TORCH.values(), ids=TORCH)
def test_torch(tensor):
    buffer = buffers.of(tensor, "x")
    view = tensor.detach().numpy()
    assert (buffer.address, buffer.device, buffer.readonly) == (tensor.data_ptr(), "cpu", False)
    assert (buffer.shape, buffer.strides) == (view.shape, tuple(4 * s for s in tensor.stride()))
    assert buffer.owner is tensor
    np.testing.assert_array_equal(np.asarray(buffer), view, strict=True)


# ---- other libraries ---------------------------------------------------------------------------


@wrappers
def test_wrapped_memory_is_shared(wrap):
    a = BASE.copy()
    buffer = buffers.of(wrap(a), "x")
    assert (buffer.address, buffer.shape, buffer.strides) == (a.ctypes.data, a.shape, a.strides)
    assert (buffer.dtype, buffer.itemsize, buffer.device) == ("float32", 4, "cpu")
    a[:] = 7
    assert (np.asarray(buffer) == 7).all()


@wrappers
def test_a_buffer_keeps_its_memory_alive(wrap):
    a = BASE.copy()
    alive = weakref.ref(a)
    buffer = buffers.of(wrap(a), "x")
    del a
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(np.asarray(buffer), BASE)
    del buffer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["numpy", "array_interface", "memoryview"])
def test_readonly_is_passed_on(name):
    assert buffers.of(WRAPPERS[name](readonly(BASE)), "x").readonly
    assert not buffers.of(WRAPPERS[name](BASE.copy()), "x").readonly


def test_array_array():
    a = array.array("i", [1, 2, 3])
    buffer = buffers.of(a, "y")
    assert (buffer.address, buffer.shape, buffer.dtype) == (a.buffer_info()[0], (3,), "int32")
    assert not buffer.readonly


def test_cuda_array():
    a = cuda_array((2, 3, 4), "<f8", data=(1 << 40, True), stream=5)
    a.device = SimpleNamespace(id=1)
    buffer = buffers.of(a, "x")
    assert (buffer.address, buffer.shape, buffer.strides) == (1 << 40, (2, 3, 4), (96, 32, 8))
    assert (buffer.dtype, buffer.itemsize) == ("float64", 8)
    assert (buffer.device, buffer.readonly, buffer.stream) == ("cuda:1", True, 5)
    assert buffer.owner is a


@pytest.mark.parametrize(
    ("shape", "given", "strides"),
    [
        ((2, 3), {"strides": (4, 8)}, (4, 8)),
        ((2, 3), {}, (12, 4)),
        ((3,), {"strides": None}, (4,)),
        ((), {}, ()),
        ((2, 0, 3), {}, (0, 12, 4)),
    ],
    ids=["given", "left_out", "none", "no_axes", "no_elements"],
)
def test_cuda_array_strides(shape, given, strides):
    assert buffers.of(cuda_array(shape, **given), "x").strides == strides


@pytest.mark.parametrize("handle", [None, 0, 1, 2, 1 << 40])
def test_cuda_array_stream(handle):
    assert buffers.of(cuda_array(stream=handle), "x").stream == handle


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_older_interface_does_not_say_when_memory_may_be_read(version):
    """So that DLPack is used, which waits; without it there is nothing that could."""
    old, new = cuda_array(version=version), cuda_array(version=3)
    for a in (old, new):
        a.__dlpack_device__ = lambda: (2, 1)
        a.__dlpack__ = lambda *, stream: cuda_capsule(BASE, (2, stream))
    assert buffers.of(old, "x").address == BASE.ctypes.data
    assert (buffers.of(old, "x").stream, buffers.of(old, "x").device) == (0, "cuda:1")
    assert (buffers.of(new, "x").address, buffers.of(new, "x").stream) == (4096, None)
    del old.__dlpack__
    assert (buffers.of(old, "x").address, buffers.of(old, "x").stream) == (4096, None)


@pytest.mark.parametrize(
    ("typestr", "dtype"), [("|b1", "bool"), ("|u1", "uint8"), ("<f2", "float16"), ("<i8", "int64")]
)
def test_cuda_array_dtype(typestr, dtype):
    buffer = buffers.of(cuda_array(typestr=typestr), "x")
    assert (buffer.dtype, buffer.itemsize) == (dtype, int(typestr[2]))


@pytest.mark.parametrize(("own", "dtype"), [(ml_dtypes.bfloat16, "bfloat16"), ("V2", "void16")])
def test_cuda_array_of_two_bytes_of_anything(own, dtype):
    a = cuda_array(typestr="<V2")
    assert buffers.of(a, "x").dtype == "void16"
    a.dtype = np.dtype(own)
    buffer = buffers.of(a, "x")
    assert (buffer.dtype, buffer.itemsize, buffer.strides) == (dtype, 2, (6, 2))


@pytest.mark.parametrize("address", [0, 4097])
def test_cuda_array_without_elements_has_no_address(address):
    assert buffers.of(cuda_array((2, 0), address=address), "x").address == 0


def test_cuda_device_number():
    a = cuda_array()
    assert buffers.of(a, "x").device == "cuda:0"
    a.gpu_data = SimpleNamespace(context=SimpleNamespace(device=SimpleNamespace(id=1)))
    assert buffers.of(a, "x").device == "cuda:1"
    a.device = SimpleNamespace(id=2)
    assert buffers.of(a, "x").device == "cuda:2"
    a.__dlpack_device__ = lambda: (2, 3)
    assert buffers.of(a, "x").device == "cuda:3"
    a.device = "a name"
    del a.__dlpack_device__
    assert buffers.of(a, "x").device == "cuda:1"


def test_cuda_memory_is_not_viewed_by_numpy():
    buffer = buffers.of(cuda_array(), "x")
    with pytest.raises(TypeError, match=r"^memory on cuda:0 cannot be viewed by NumPy$"):
        np.asarray(buffer)


# ---- DLPack on CUDA ----------------------------------------------------------------------------

CODE = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}
HEAD = "Piii BBH PP Q"  # DLTensor: data, device (kind, number), ndim, dtype, shape, strides, offset


def cuda_capsule(a, device=(2, 0), dtype=None, offset=0, strides=True):
    """A capsule of host memory that claims to be CUDA memory; its destructor is unchanged."""
    capsule = a.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    head = (ctypes.c_char * struct.calcsize(HEAD)).from_address(pointer(capsule, b"dltensor"))
    data, _, _, ndim, *own, shape, steps, start = struct.unpack(HEAD, head)
    fields = (data - offset, *device, ndim, *(dtype or own), shape, steps * strides, start + offset)
    struct.pack_into(HEAD, head, 0, *fields)
    return capsule


def cuda_dlpack(a, device=(2, 0), **changes):
    """An array on a CUDA device that supports nothing but DLPack."""

    class Exporter:
        def __dlpack__(self, *, stream):
            assert stream == 1
            return cuda_capsule(a, device, **changes)

        def __dlpack_device__(self):
            return device

    return Exporter()


@pytest.mark.parametrize("device", [(2, 0), (2, 3), (13, 1)])
@pytest.mark.parametrize(
    "name", ["c_order", "fortran_order", "negative_strides", "sliced", "transposed", "no_axes"]
)
def test_cuda_dlpack(name, device):
    a = NUMPY[name]
    exporter = cuda_dlpack(a, device)
    buffer = buffers.of(exporter, "x")
    assert (buffer.address, buffer.shape, buffer.strides) == (a.ctypes.data, a.shape, a.strides)
    assert (buffer.dtype, buffer.itemsize) == (a.dtype.name, a.itemsize)
    assert (buffer.device, buffer.stream) == (f"cuda:{device[1]}", 0)
    assert buffer.owner is exporter
    assert not buffer.readonly


def test_cuda_dlpack_without_strides_is_contiguous():
    buffer = buffers.of(cuda_dlpack(BASE, strides=False), "x")
    assert (buffer.shape, buffer.strides) == (BASE.shape, BASE.strides)
    assert buffer.layout is buffers.of(cuda_dlpack(BASE), "x").layout


@pytest.mark.parametrize("offset", [0, 4, 1 << 40])
def test_cuda_dlpack_counts_from_the_offset(offset):
    a = BASE + 1
    assert buffers.of(cuda_dlpack(a, offset=offset), "x").address == a.ctypes.data


def test_cuda_dlpack_without_elements_has_no_address():
    assert buffers.of(cuda_dlpack(NUMPY["no_elements"], offset=1), "x").address == 0


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64", "bool", "int8", "uint64"])
def test_cuda_dlpack_dtype(name):
    tensor = torch.zeros(2, 3, dtype=getattr(torch, name))
    buffer = buffers.of(cuda_dlpack(tensor), "x")
    assert (buffer.dtype, buffer.itemsize) == (name, tensor.itemsize)
    assert buffer.strides == (3 * tensor.itemsize, tensor.itemsize)


@pytest.mark.parametrize(
    "dtype", [(CODE["complex"], 64, 1), (3, 64, 1), (9, 8, 1), (CODE["float"], 32, 2), (0, 4, 1)]
)
def test_cuda_dlpack_of_other_elements(dtype):
    with pytest.raises(TypeError) as caught:
        buffers.of(cuda_dlpack(BASE, dtype=dtype), "x")
    assert str(caught.value) == (
        "x has an element type that cannot be read through DLPack "
        f"(type code {dtype[0]}, {dtype[1]} bits, {dtype[2]} lanes)"
    )


def test_a_buffer_keeps_what_a_cuda_exporter_lends():
    lent = []

    class Lender:
        def __dlpack__(self, *, stream):
            a = BASE.copy()
            lent.append(weakref.ref(a))
            return cuda_capsule(a)

        def __dlpack_device__(self):
            return 2, 0

    buffer = buffers.of(Lender(), "y")
    buffer = replace(buffer, layout=buffer.layout)  # as calls.call does
    gc.collect()
    assert lent[0]() is not None
    assert ctypes.c_float.from_address(buffer.address + 4 * 23).value == 23
    del buffer
    gc.collect()
    assert lent[0]() is None
    assert len(lent) == 1


def test_cuda_dlpack_that_refuses():
    class Refuses:
        def __dlpack__(self, *, stream):
            raise BufferError("it is sharded")

        def __dlpack_device__(self):
            return 2, 0

    with pytest.raises(TypeError, match=r"^x cannot be read through DLPack: it is sharded$"):
        buffers.of(Refuses(), "x")


# ---- refusals ----------------------------------------------------------------------------------

NOT_AN_ARRAY = (
    "x must be an array (NumPy, torch, CuPy, DLPack), got {}; "
    "lists and numbers are not converted, since that would copy"
)
PACKED = np.zeros(4, [("a", "u1"), ("b", np.float32)])
REFUSED = {
    "list": ([1.0, 2.0], NOT_AN_ARRAY.format("list")),
    "float": (1.0, NOT_AN_ARRAY.format("float")),
    "none": (None, NOT_AN_ARRAY.format("NoneType")),
    "masked": (
        np.ma.masked_less(BASE, 3),
        "x is a masked array, whose mask would be ignored; "
        "pass the plain array and mark masked voxels in the labels with ignore_label",
    ),
    "byte_swapped": (BASE.astype(">f4"), "x is not in native byte order (>f4)"),
    "byte_swapped_cuda": (cuda_array(typestr=">f4"), "x is not in native byte order (>f4)"),
    "masked_cuda": (
        cuda_array(mask=cuda_array(typestr="|b1")),
        "x is a masked array, whose mask would be ignored; "
        "pass the plain array and mark masked voxels in the labels with ignore_label",
    ),
    "misaligned_cuda": (
        cuda_array(address=4098),
        "x's elements are not aligned to 4 bytes",
    ),
    "misaligned_strides_cuda": (
        cuda_array(strides=(14, 4)),
        "x's elements are not aligned to 4 bytes",
    ),
    "misaligned_dlpack": (
        cuda_dlpack(BASE[:, :, 1:], dtype=(CODE["float"], 64, 1)),
        "x's elements are not aligned to 8 bytes",
    ),
    "misaligned_address": (
        np.zeros(17, np.uint8)[1:].view(np.float32),
        "x's elements are not aligned to 4 bytes",
    ),
    "misaligned_strides": (PACKED["b"], "x's elements are not aligned to 4 bytes"),
    "sparse": (
        torch.zeros(2, 3).to_sparse(),
        "x is a sparse_coo tensor; call .to_dense() on it",
    ),
    "lazily_negated": (
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        "x is a lazily negated view; call .resolve_neg() on it",
    ),
    "dlpack_elsewhere": (
        dlpack(BASE, device=(4, 0)),
        "x is on DLPack device (4, 0) and has no __cuda_array_interface__; "
        "only host and CUDA memory is read through DLPack",
    ),
}


@pytest.mark.parametrize(("a", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(a, text):
    with pytest.raises(TypeError) as caught:
        buffers.of(a, "x")
    assert str(caught.value) == text


def test_dlpack_of_a_dtype_numpy_lacks_is_refused_by_name():
    with pytest.raises(TypeError, match=r"^x .*DLPack.*dtype"):
        buffers.of(dlpack(torch.zeros(3, dtype=torch.bfloat16)), "x")


# ---- libraries on a device ---------------------------------------------------------------------
#
# There is no device here: the libraries are fakes whose device memory is host memory, which records
# the number of the device that was current when it was allocated.


class Devices:
    """`with devices(n)` and `with devices[n]` make device n the current one."""

    def __init__(self):
        self.current = 0

    @contextlib.contextmanager
    def __call__(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    __getitem__ = __call__


def interface(a, **more):
    strides = None if a.flags.c_contiguous else a.strides
    data = (a.__array_interface__["data"][0], False)
    facts = {"shape": a.shape, "typestr": a.dtype.str, "data": data, "strides": strides}
    return facts | {"version": 3} | more


def fake_cupy(monkeypatch):
    devices = Devices()

    class ndarray:
        __module__ = "cupy"

        def __init__(self, a):
            self.a, self.dtype, self.device = a, a.dtype, SimpleNamespace(id=devices.current)

        __cuda_array_interface__ = property(lambda self: interface(self.a, stream=1))

        def __array_namespace__(self):
            raise AssertionError("CuPy's empty takes no device")

        def get(self):
            return self.a.copy()

    module = ModuleType("cupy")
    module.cuda = SimpleNamespace(Device=devices)
    module.empty = lambda shape, dtype: ndarray(np.empty(shape, dtype))
    module.empty_like = lambda like: ndarray(np.empty_like(like.a))
    monkeypatch.setitem(sys.modules, "cupy", module)

    def make(a, index):
        with devices(index):
            return type("Subclass", (ndarray,), {"__module__": "mine"})(a)

    return make


class Stream:
    """A stream whose queued work is executed when it is synchronized."""

    def __init__(self):
        self.work = []

    def __int__(self):
        return 1 << 40

    def synchronize(self):
        for copy, args in self.work:
            copy(*args)


def fake_numba(monkeypatch, stream=0):
    devices = Devices()

    class DeviceNDArray:
        __module__ = "numba.cuda.cudadrv.devicearray"

        def __init__(self, a, stream):
            context = SimpleNamespace(device=SimpleNamespace(id=devices.current))
            self.a, self.dtype, self.stream = a, a.dtype, stream
            self.gpu_data = SimpleNamespace(context=context)

        @property
        def __cuda_array_interface__(self):
            return interface(self.a, stream=int(self.stream) or None)

        def copy_to_host(self):
            if not self.stream:
                return self.a.copy()
            copy = np.zeros_like(self.a)
            self.stream.work.append((np.copyto, (copy, self.a)))
            return copy

    def device_array(shape, dtype=np.float64, strides=None, order="C", stream=0):
        return DeviceNDArray(np.ndarray(shape, dtype, strides=strides, order=order), stream)

    cuda = ModuleType("numba.cuda")
    cuda.gpus, cuda.device_array = devices, device_array
    monkeypatch.setitem(sys.modules, "numba.cuda", cuda)

    def make(a, index):
        with devices[index]:
            return DeviceNDArray(a, stream)

    return make


def fake_numba_on_a_stream(monkeypatch):
    return fake_numba(monkeypatch, Stream())


def fake_jax(monkeypatch):
    """Supports the array API standard; float64 must be enabled. Work on an array is finished for
    whoever waits for it, as `__dlpack__` does and version 2 of the CUDA array interface does not.
    """
    module = ModuleType("fake_jax")

    class Array:
        def __init__(self, a, device):
            self.a, self.dtype, self.device = a, a.dtype, device
            self.finished_on = []  # streams

        @property
        def __cuda_array_interface__(self):
            return interface(self.a, version=2)

        def __array_namespace__(self):
            return module

        def __dlpack_device__(self):
            return 2, self.device.local_number

        def __dlpack__(self, *, stream=None, dl_device=None, copy=None):
            if dl_device is None:
                assert (stream, copy) == (1, None)
                self.finished_on.append(stream)
                return cuda_capsule(self.a, self.__dlpack_device__())
            assert (stream, dl_device, copy) == (None, (1, 0), True)
            return self.a.copy().__dlpack__()

    def empty(shape, *, dtype=None, device=None):
        narrow = {None: "float32", np.dtype("float64"): "float32"}
        return Array(np.empty(shape, narrow.get(dtype, dtype)), device)

    module.empty = empty
    for name in ("float32", "float64", "uint8", "int64"):
        setattr(module, name, np.dtype(name))
    return lambda a, index: Array(a, SimpleNamespace(id=index + 8, local_number=index))


FAKES = {
    "cupy": fake_cupy,
    "numba": fake_numba,
    "numba_on_a_stream": fake_numba_on_a_stream,
    "jax": fake_jax,
}
libraries = pytest.mark.parametrize("fake", FAKES.values(), ids=FAKES)


@libraries
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64"])
def test_empty_on_a_device(fake, dtype, monkeypatch):
    near = buffers.of(fake(monkeypatch)(BASE, 3), "x")
    assert near.device == "cuda:3"
    if fake is fake_jax and dtype in ("float16", "float64"):
        with pytest.raises(TypeError) as caught:
            allocators.empty(near, (5, 2), dtype)
        assert str(caught.value) == f"fake_jax does not support {dtype} arrays; {REMEDY}"
        return
    new = allocators.empty(near, (5, 2), dtype)
    assert type(new) in type(near.owner).__mro__
    buffer = buffers.of(new, "new")
    assert (buffer.shape, buffer.dtype, buffer.device) == ((5, 2), dtype, "cuda:3")
    assert buffer.strides == (2 * buffer.itemsize, buffer.itemsize)
    assert buffer.stream == near.stream


def test_jax_is_waited_for(monkeypatch):
    a = fake_jax(monkeypatch)(BASE, 3)
    buffer = buffers.of(a, "x")
    assert (buffer.address, buffer.device, buffer.stream) == (BASE.ctypes.data, "cuda:3", 0)
    assert a.finished_on == [1]  # CUDA's handle of the default stream
    new = allocators.empty(buffer, (2,), "float32")  # JAX fills it
    at = buffers.of(new, "new")
    assert (at.stream, new.finished_on[-1]) == (0, 1)


@libraries
@pytest.mark.parametrize(
    "name", ["c_order", "transposed", "fortran_order", "negative_strides", "sliced", "float16"]
)
def test_empty_like_on_a_device(fake, name, monkeypatch):
    a = fake(monkeypatch)(NUMPY[name], 3)
    like, new = buffers.of(a, "x"), allocators.empty_like(a, "x")
    assert type(new) in type(a).__mro__
    buffer = buffers.of(new, "new")
    keeps_strides = fake is not fake_jax and name in ("transposed", "fortran_order")
    expected = like.strides if keeps_strides else np.empty(like.shape, like.dtype).strides
    assert (buffer.shape, buffer.dtype, buffer.device) == (like.shape, like.dtype, "cuda:3")
    assert buffer.strides == expected
    assert (buffer.stream, buffer.readonly) == (like.stream, False)
    assert new.a is not a.a


@pytest.mark.parametrize("fake", [fake_cupy, fake_numba])
def test_empty_like_of_bfloat16(fake, monkeypatch):
    a = fake(monkeypatch)(np.zeros((2, 3), ml_dtypes.bfloat16), 0)
    new = allocators.empty_like(a, "x")
    assert new.dtype == ml_dtypes.bfloat16
    assert buffers.of(new, "new").dtype == "bfloat16"


@libraries
@pytest.mark.parametrize("name", ["c_order", "transposed", "sliced", "no_axes"])
def test_to_host_from_a_device(fake, name, monkeypatch):
    a = NUMPY[name]
    host = allocators.to_host(buffers.of(fake(monkeypatch)(a, 3), "x"))
    np.testing.assert_array_equal(host, a, strict=True)
    assert not np.shares_memory(host, a)


@libraries
def test_to_host_has_the_shape_of_the_buffer(fake, monkeypatch):
    buffer = buffers.of(fake(monkeypatch)(BASE[:, None], 0), "y")
    host = allocators.to_host(replace(buffer, layout=buffer.layout.without_axis(1)))
    np.testing.assert_array_equal(host, BASE, strict=True)


REMEDY = "view it as torch or CuPy first: torch.as_tensor(x), cupy.asarray(x)"
NO_ALLOCATOR = {
    "cuda_array": (cuda_array(), "SimpleNamespace", "no attribute '__dlpack__'"),
    "dlpack": (cuda_dlpack(BASE), "Exporter", "unexpected keyword argument"),
}


@pytest.mark.parametrize(("a", "kind", "why"), NO_ALLOCATOR.values(), ids=NO_ALLOCATOR)
def test_device_arrays_of_no_known_library(a, kind, why):
    buffer = buffers.of(a, "x")
    with pytest.raises(TypeError) as caught:
        allocators.empty(buffer, (2, 3), "float32")
    assert str(caught.value) == f"cannot allocate arrays of type {kind}; {REMEDY}"
    with pytest.raises(TypeError) as caught:
        allocators.empty_like(a, "x")
    assert str(caught.value) == f"cannot allocate an array like x, of type {kind}; {REMEDY}"
    with pytest.raises(TypeError) as caught:
        allocators.to_host(buffer)
    assert str(caught.value).startswith(f"a {kind} cannot be copied to the host (")
    assert why in str(caught.value)
    assert str(caught.value).endswith(f"); {REMEDY}")


@libraries
def test_device_arrays_with_equal_layouts_share_an_instance(fake, monkeypatch):
    make = fake(monkeypatch)
    one, other = buffers.of(make(BASE, 1), "x"), buffers.of(make(BASE.copy(), 1), "x")
    assert one.layout is other.layout
    assert buffers.of(make(BASE, 2), "x").layout is not one.layout


def test_strides_given_or_left_out_are_one_layout():
    given = buffers.of(cuda_array((2, 3), strides=(12, 4)), "x")
    assert given.layout is buffers.of(cuda_array((2, 3)), "x").layout


# ---- torch on a device -------------------------------------------------------------------------


class CudaTensor:
    """Wraps a tensor and claims that its memory is on the device cuda:1."""

    __module__ = "torch"
    is_cuda, device, layout = True, torch.device("cuda", 1), torch.strided

    def __init__(self, tensor, steps=("detach", "cpu", "numpy")):
        self.tensor, self.steps = tensor, steps
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.stride, self.data_ptr, self.is_neg = tensor.stride, tensor.data_ptr, tensor.is_neg
        self.is_nested = False

    def __getattr__(self, name):
        if name != self.steps[0]:
            raise AttributeError(name)
        rest = self.steps[1:]
        return lambda: CudaTensor(self.tensor, rest) if rest else self.tensor.clone().numpy()


@pytest.fixture
def cuda_torch(monkeypatch):
    def current_stream(device):
        return SimpleNamespace(cuda_stream=1000 + device.index)

    module = ModuleType("torch")
    module.Tensor, module.strided = CudaTensor, torch.strided
    module._C = SimpleNamespace()
    module.cuda = SimpleNamespace(current_stream=current_stream)
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_torch_stream(cuda_torch):
    a = CudaTensor(torch.zeros(2, 3))
    buffer = buffers.of(a, "x")
    assert (buffer.device, buffer.stream, buffer.owner) == ("cuda:1", 1001, a)
    assert (buffer.shape, buffer.strides, buffer.dtype) == ((2, 3), (12, 4), "float32")
    cuda_torch._C._cuda_getCurrentRawStream = lambda index: 2000 + index
    assert buffers.of(a, "x").stream == 2001


def test_to_host_from_torch(cuda_torch):
    tensor = torch.arange(24).reshape(2, 1, 3, 4)
    buffer = buffers.of(CudaTensor(tensor), "y")
    host = allocators.to_host(replace(buffer, layout=buffer.layout.without_axis(1)))
    np.testing.assert_array_equal(host, tensor.numpy()[:, 0], strict=True)


class Streams:
    """The part of torch.cuda that weights on a device need: a current stream, `number`."""

    def __init__(self):
        self.number, self.capturing = 1, False

    def current_stream(self, device):
        return SimpleNamespace(cuda_stream=self.number)

    def is_current_stream_capturing(self):
        return self.capturing


@pytest.fixture
def weights_on(cuda_torch, monkeypatch):
    """A function that gives the copy of class weights for kernels on a stream; torch is a fake."""
    streams = cuda_torch.cuda = Streams()

    class Copy(CudaTensor):
        __module__ = "torch"

        def __init__(self, tensor):
            super().__init__(tensor)
            self.read_on = []

        def record_stream(self, stream):
            self.read_on.append(stream.cuda_stream)

    def from_numpy(numbers):
        return SimpleNamespace(to=lambda device: Copy(torch.from_numpy(numbers)))

    def copy(numbers, stream):
        streams.number = stream
        near = buffers.of(CudaTensor(torch.zeros(2, 3)), "x")
        assert near.stream == stream
        return allocators.on_device(np.array(numbers, np.float64), near)

    cuda_torch.from_numpy = from_numpy
    allocators._copied.cache_clear()
    allocators._captured.clear()
    yield copy, streams
    allocators._copied.cache_clear()
    allocators._captured.clear()


def test_weights_that_another_stream_reads_are_not_freed_before(weights_on):
    """torch gives the memory of a tensor to others in the order of the stream that it was made on,
    and of those recorded.
    """
    copy, _ = weights_on
    first = copy([1, 2, 3], 5)
    assert copy([1, 2, 3], 5) is first
    assert first.read_on == []  # the usual case, without a call
    assert copy([1, 2, 3], 6) is first
    assert copy([1, 2, 3], 7) is first
    assert first.read_on == [6, 7]
    assert buffers.of(first, "weight").stream == 7  # kernels need not wait for the weight
    assert copy([1, 2, 4], 7).read_on == []


def test_weights_that_a_cuda_graph_reads_are_kept(weights_on):
    """It reads them whenever it is replayed, long after they have left the cache."""
    copy, streams = weights_on
    captured, dropped = weakref.ref(copy([1], 5)), weakref.ref(copy([2], 5))
    streams.capturing = True
    for _ in range(2):
        copy([1], 6)
    streams.capturing = False
    for number in range(100):
        copy([number + 10], 5)
    gc.collect()
    assert dropped() is None
    assert captured() is not None
    assert len(allocators._captured) == 1


# ---- empty and to_host -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "uint8", "int64"])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta": a device that any torch has
def test_empty_torch(name, device):
    near = buffers.of(torch.zeros(4, 3, device=device).T, "x")
    new = allocators.empty(near, [2, 3], name)
    assert (new.shape, new.dtype, new.device.type) == ((2, 3), getattr(torch, name), device)
    assert new.is_contiguous()
    assert not new.requires_grad


@wrappers
@pytest.mark.parametrize("name", ["float16", "float32", "float64", "uint8", "int64"])
def test_empty_near_host_memory(wrap, name):
    new = allocators.empty(buffers.of(wrap(BASE.copy()), "x"), (2, 3), name)
    assert type(new) is (torch.Tensor if wrap is torch.from_numpy else np.ndarray)
    assert np.asarray(new).dtype == name
    assert np.asarray(new).shape == (2, 3)
    assert np.asarray(new).flags.c_contiguous


@wrappers
def test_to_host_of_host_memory_is_itself(wrap):
    a = BASE.copy()
    host = allocators.to_host(buffers.of(wrap(a), "x"))
    np.testing.assert_array_equal(host, BASE, strict=True)
    assert np.shares_memory(host, a)


# ---- empty_like --------------------------------------------------------------------------------


def test_empty_like_numpy_bfloat16():
    new = allocators.empty_like(np.zeros((2, 3), ml_dtypes.bfloat16), "x")
    assert (new.shape, new.dtype) == ((2, 3), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "name", ["c_order", "fortran_order", "transposed", "readonly", "no_elements", "float16"]
)
def test_empty_like_numpy(name):
    a = NUMPY[name]
    new = allocators.empty_like(a, "x")
    assert type(new) is np.ndarray
    assert (new.shape, new.strides, new.dtype) == (a.shape, a.strides, a.dtype)
    assert new.flags.writeable
    assert not np.shares_memory(new, a)


@pytest.mark.parametrize("name", ["sliced", "broadcast", "negative_strides"])
def test_empty_like_of_an_array_with_gaps_has_none(name):
    new = allocators.empty_like(NUMPY[name], "x")
    assert new.shape == NUMPY[name].shape
    assert new.flags.c_contiguous


def test_empty_like_memmap_is_plain_memory(tmp_path):
    a = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 3))
    assert type(allocators.empty_like(a, "x")) is np.ndarray


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed", "requires_grad"])
def test_empty_like_torch(name):
    new = allocators.empty_like(TORCH[name], "x")
    assert isinstance(new, torch.Tensor)
    assert (new.shape, new.stride()) == (TORCH[name].shape, TORCH[name].stride())
    assert new.dtype == TORCH[name].dtype
    assert not new.requires_grad


@pytest.mark.parametrize("wrap", [dlpack, memoryview], ids=["dlpack", "memoryview"])
def test_empty_like_other_host_memory_is_numpy(wrap):
    new = allocators.empty_like(wrap(BASE.copy()), "x")
    assert type(new) is np.ndarray
    assert (new.shape, new.dtype) == (BASE.shape, BASE.dtype)


# ---- overlap -----------------------------------------------------------------------------------

LINE = np.zeros(24, np.float32)
HALF = torch.zeros(24, dtype=torch.bfloat16)
OVERLAP = {
    "itself": (BASE, BASE, True),
    "transposed": (BASE, BASE.T, True),
    "reversed": (LINE, LINE[::-1], True),
    "other_dtype": (LINE, LINE.view(np.uint8)[5:6], True),
    "one_common_element": (LINE[:13], LINE[12:], True),
    "halves": (LINE[:12], LINE[12:], False),
    "interleaved": (LINE[::2], LINE[1::2], False),
    "apart": (LINE, LINE.copy(), False),
    "no_elements": (LINE, LINE[:0], False),
    "torch_and_numpy": (torch.from_numpy(LINE), LINE, True),
    "bfloat16_common": (HALF[:13], HALF[12:], True),
    "bfloat16_interleaved": (HALF[::2], HALF[1::2], False),
    "cuda_common": (cuda_array((3,)), cuda_array((3,), address=4096 + 8), True),
    "cuda_backwards": (cuda_array((3,), strides=(-4,)), cuda_array((2,), address=4088), True),
    "cuda_apart": (cuda_array((3,)), cuda_array((3,), address=4096 + 12), False),
    "cuda_and_cpu": (cuda_array((6,), address=LINE.ctypes.data), LINE, False),
}


@pytest.mark.parametrize(("a", "b", "expected"), OVERLAP.values(), ids=OVERLAP)
def test_may_overlap(a, b, expected):
    a, b = buffers.of(a, "a"), buffers.of(b, "b")
    assert buffers.may_overlap(a, b) is expected
    assert buffers.may_overlap(b, a) is expected


def test_may_overlap_if_the_exact_answer_takes_too_long():
    # The example of numpy.shares_memory's documentation, two arrays that do not overlap.
    one = buffers.Layout((1049,) * 3, (36674, 61119, 85569), "int8", 1, "cpu")
    other = buffers.Layout((1049, 1049, 1), (12223, 12224, 1), "int8", 1, "cpu")
    a, b = buffers.Buffer(4096, one, None), buffers.Buffer(4096 + 64023025, other, None)
    assert buffers.may_overlap(a, b)


SELF_OVERLAP = {
    "c_order": (BASE, False),
    "fortran_order": (np.asfortranarray(BASE), False),
    "reversed": (BASE[::-1, :, ::-1], False),
    "every_other": (BASE[:, ::2, ::3], False),
    "interleaved_rows": (np.lib.stride_tricks.as_strided(LINE, (2, 2), (12, 8)), False),
    "one_of_many": (LINE[:, None][:, [0]], False),
    "length_one_axis_of_stride_0": (np.lib.stride_tricks.as_strided(LINE, (1, 4), (0, 4)), False),
    "no_axes": (np.array(1.0), False),
    "broadcast": (NUMPY["broadcast"], True),
    "sliding_window": (np.lib.stride_tricks.sliding_window_view(LINE, 3), True),
    "expanded": (TORCH["expanded"], True),
}


@pytest.mark.parametrize(("a", "expected"), SELF_OVERLAP.values(), ids=SELF_OVERLAP)
def test_may_overlap_itself(a, expected):
    assert buffers.may_overlap_itself(buffers.of(a, "a").layout) is expected


# ---- the rest ----------------------------------------------------------------------------------


def test_without_axis():
    layout = buffers.of(BASE[:, None], "y").layout.without_axis(1)
    assert (layout.shape, layout.strides) == (BASE.shape, BASE.strides)


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_arrays_with_equal_layouts_share_an_instance(wrap):
    one, other = buffers.of(wrap(BASE), "x"), buffers.of(wrap(BASE.copy()), "x")
    assert one.layout is other.layout
    assert buffers.of(wrap(BASE.copy())[:, :, :2], "x").layout is not one.layout


def test_text_counts_strides_in_elements():
    assert str(buffers.of(BASE, "x").layout) == "float32 (2, 3, 4) on cpu, strides (12, 4, 1)"
