"""buffers: where an array of any library lies, found out without copying it."""

import array
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dice_core import buffers

BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def readonly(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def cuda_array(shape=(2, 3), typestr="<f4", address=4096, **more):
    """Has an address that is never read."""
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


def test_cuda_memory_is_not_viewed_by_numpy():
    buffer = buffers.of(cuda_array(), "x")
    with pytest.raises(TypeError, match=r"^memory on cuda:0 cannot be viewed by NumPy$"):
        np.asarray(buffer)


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
        "x is a masked array and its mask would be ignored; "
        "give the plain array and mark masked voxels in the labels with ignore_label",
    ),
    "byte_swapped": (BASE.astype(">f4"), "x is in another byte order (>f4)"),
    "byte_swapped_cuda": (cuda_array(typestr=">f4"), "x is in another byte order (>f4)"),
    "misaligned_address": (
        np.zeros(17, np.uint8)[1:].view(np.float32),
        "x's elements are not aligned to their 4 bytes",
    ),
    "misaligned_strides": (PACKED["b"], "x's elements are not aligned to their 4 bytes"),
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
        "x lies on DLPack device (4, 0) and has no __cuda_array_interface__; "
        "only host memory is read through DLPack",
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


# ---- empty_like --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["c_order", "fortran_order", "transposed", "readonly", "no_elements", "float16"]
)
def test_empty_like_numpy(name):
    a = NUMPY[name]
    new = buffers.empty_like(a, "x")
    assert type(new) is np.ndarray
    assert (new.shape, new.strides, new.dtype) == (a.shape, a.strides, a.dtype)
    assert new.flags.writeable
    assert not np.shares_memory(new, a)


@pytest.mark.parametrize("name", ["sliced", "broadcast", "negative_strides"])
def test_empty_like_of_what_is_not_dense_owns_no_gaps(name):
    new = buffers.empty_like(NUMPY[name], "x")
    assert new.shape == NUMPY[name].shape
    assert new.flags.c_contiguous


def test_empty_like_memmap_is_plain_memory(tmp_path):
    a = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 3))
    assert type(buffers.empty_like(a, "x")) is np.ndarray


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed", "requires_grad"])
def test_empty_like_torch(name):
    new = buffers.empty_like(TORCH[name], "x")
    assert isinstance(new, torch.Tensor)
    assert (new.shape, new.stride()) == (TORCH[name].shape, TORCH[name].stride())
    assert new.dtype == TORCH[name].dtype
    assert not new.requires_grad


@pytest.mark.parametrize("wrap", [dlpack, memoryview], ids=["dlpack", "memoryview"])
def test_empty_like_other_host_memory_is_numpy(wrap):
    new = buffers.empty_like(wrap(BASE.copy()), "x")
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


def test_may_overlap_where_finding_out_takes_too_long():
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
def test_arrays_that_lie_alike_share_a_layout(wrap):
    one, other = buffers.of(wrap(BASE), "x"), buffers.of(wrap(BASE.copy()), "x")
    assert one.layout is other.layout
    assert buffers.of(wrap(BASE.copy())[:, :, :2], "x").layout is not one.layout


def test_text_counts_strides_in_elements():
    assert str(buffers.of(BASE, "x").layout) == "float32 (2, 3, 4) on cpu, strides (12, 4, 1)"
