# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""The sums over voxels and their gradient on the CPU.

Design
------
1. The sums, per sample and class over the valid voxels: I = sum s_c [y=c], P = sum s_c^p, Y = sum [y=c] and, if
   requested, H = sum [y=c] (1 - s_c)^gamma (-log s_c), with s = softmax(x); a single channel is two classes,
   (1 - sigmoid(x), sigmoid(x)). `cpu/plain.pxi` computes these, and `cpu/binary.pxi`, if requested, B+ and B-, the same
   as H for sigmoid(x_c), of the voxels in and outside the class. Other activations, targets and sums share one loop, in
   `cpu/general.pxi`. The gradient is the vector-Jacobian product of the sums.
2. Precision: float64 logits are computed in float64, all others in float32; float16 and bfloat16 are converted on load,
   and their gradient is rounded once, on store. Sums over up to 1024 voxels (a tile) are in that precision, too; from
   there on they are in float64.
3. Units of work, from large to small. A *chunk*, some ten thousand voxels of one sample, is the work item of a thread;
   its size depends only on the shape. A *tile*, up to 1024 voxels, is summed before conversion to float64. A *block* is
   the part of a tile for which the exponentials of all classes stay in the L1 cache (for many classes: in L2). A *line*
   is 64 bytes of numbers: 16 voxels in float32, one cache line.
4. A thread works through neighbouring chunks, then helps other threads with theirs (`cpu/parallel.h`). The sums of the
   chunks are added in order afterwards: bitwise reproducible for any number of threads.
5. For a block, the exponentials of all classes go to scratch; from there they are summed class by class, or turned into
   the gradient. For up to eight classes the compiler unrolls the softmax for their number, and its voxels' gradient is
   that of all classes at a time; with more, everything is done class by class, and the logits of the next class are
   prefetched meanwhile: the prefetch distance is one class of a block.
6. Loops are short: a processor works on as many voxels at a time as their instructions fit into its window, and one
   long loop, from load to sum, would leave it waiting for the latencies of exp, division and log. The gradient of two
   classes, the most common case, is short enough to do without scratch.
7. Any strides: voxels are visited in the order of the logits' strides, axes merged where possible. Where the voxels are
   contiguous, logits are read and the gradient is written in place; otherwise they are copied to or from scratch, in
   their own dtype.
8. All logits of a voxel are read before its gradient is written, so the gradient may overwrite the logits.
9. The logits of ignored voxels are replaced by 0 in scratch, not multiplied by it: their NaN or infinity has no effect.
10. Nothing of the size of the logits is allocated: there is one small scratch area per thread, and one float64 per sum,
    class and chunk for partial sums.
11. Where samples have fewer voxels than a line, as in logits (N, C), the lanes are samples (`cpu/samples.pxi`). The
    work item then is a block of samples; it goes through scratch voxel by voxel, and its ratio, such as Dice, is
    computed while its sums are in the caches.

The source is compiled once per instruction set; `cpu/simd.h` has the vectors of each.
"""

import threading

from libc.stdint cimport (
    int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t,
)
from libc.stdlib cimport calloc, free, llabs, malloc
from libc.string cimport memcpy, memset

cdef extern from "levels.h":
    int processor_supports(int) noexcept
    bint is_resident(const void *, size_t) noexcept
    const char *openmp_library() noexcept
    const char *DICE_LEVEL
    int DICE_OPENMP

cdef extern from "parallel.h":
    ctypedef Py_ssize_t (*Work)(const void *, Py_ssize_t, int) noexcept nogil
    Py_ssize_t parallel(Work, const void *, Py_ssize_t, int, bint) except -1
    int usable_threads(int) noexcept
    void watch_forks() noexcept

include "cpu/simd.pxi"

cdef enum:
    MAX_AXES = 64
    MAX_CLASSES = 1 << 24  # class indices are exact in float32
    TILE = 1024  # voxels
    FEW_CLASSES = 8  # up to so many classes, the softmax is unrolled
    BLOCK = 4096  # exponentials of a block: 16 KiB of float32, half of an L1 cache;
    LARGE_BLOCK = 32768  # of one with many classes: 128 KiB, a quarter of an L2 cache
    MAX_INTEGER_GAMMA = 16  # up to it, integer powers are computed by multiplication
    CHUNK_NUMBERS = 65536  # minimum number of logits of a chunk
    CHUNK_STEP = 256  # voxels; chunks are multiples of it
    MAX_CHUNKS = 256  # of a sample
    THREAD_NUMBERS = 32768  # logits that justify another thread
    FEW_THREAD_NUMBERS = 8192  # of samples of few voxels, of which each has sums and a ratio of its own
    SIGNAL_NUMBERS = 1 << 20  # logits that take long enough for signals to be handled meanwhile
    CACHE_LINE = 64  # bytes
    AHEAD = 8 * CACHE_LINE  # how far ahead of the loads of few classes each row is prefetched
    PAGE = 4096  # bytes

cdef extern from *:
    """
    /* Smaller probabilities come from exponentials that may have underflowed: their -log is taken from the logits. */
    #define SMALLEST_EXACT 1e-30
    /* Up to this sum of exp(x - x_0), e^32, the rounding of x - x_0 changes no probability above e^-32 by more than
       2e-6 of it. Above it the maximum is subtracted instead. */
    #define LARGEST_SUM 7.9e13
    /* Sums of exp(x), e^-16 and e^69, within which no probability above 1e-30 is lost and none overflows. */
    #define SMALLEST_UNSHIFTED_SUM 1.1e-7
    #define LARGEST_UNSHIFTED_SUM 1e30
    """
    const double SMALLEST_EXACT, LARGEST_SUM, SMALLEST_UNSHIFTED_SUM, LARGEST_UNSHIFTED_SUM

cdef enum:  # the sums, in the order of the K axis, which holds only the requested ones
    INTERSECTION, PRED_SUM, TARGET_SUM, CROSS_ENTROPY, NLL, POSITIVE, NEGATIVE, TARGET_SQUARE, VOXELS
    ROWS

cdef enum:
    SOFTMAX, SIGMOID, IDENTITY, ARGMAX, THRESHOLD

cdef enum:
    UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64

_ROWS = {
    "intersection": INTERSECTION,
    "pred_sum": PRED_SUM,
    "target_sum": TARGET_SUM,
    "cross_entropy_sum": CROSS_ENTROPY,
    "nll_sum": NLL,
    "positive_sum": POSITIVE,
    "negative_sum": NEGATIVE,
    "target_square_sum": TARGET_SQUARE,
    "voxel_count": VOXELS,
}
_ACTIVATIONS = {
    "softmax": SOFTMAX, "sigmoid": SIGMOID, "none": IDENTITY, "argmax": ARGMAX, "threshold": THRESHOLD,
}
_DTYPES = {
    "bool": UINT8, "uint8": UINT8, "int8": INT8, "uint16": UINT16, "int16": INT16, "uint32": UINT32, "int32": INT32,
    "uint64": UINT64, "int64": INT64, "float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32, "float64": FLOAT64,
}
_LABELS = {"bool": (0, 1)}  # label dtype -> (smallest, largest)
for _bits in (8, 16, 32, 64):
    _LABELS[f"int{_bits}"] = (-(2 ** (_bits - 1)), 2 ** (_bits - 1) - 1)
    _LABELS[f"uint{_bits}"] = (0, 2**_bits - 1)

ctypedef fused label_t:  # the bits of a label, signed or not
    uint8_t
    uint16_t
    uint32_t
    uint64_t

ctypedef fused target_t:
    uint8_t
    int8_t
    uint16_t
    int16_t
    uint32_t
    int32_t
    uint64_t
    int64_t
    float
    double


# ---- the problem -----------------------------------------------------------------------------------------------------

cdef struct Axes:
    # The voxels of one sample: spatial axes, outermost first, with the byte strides of each array.
    int count
    Py_ssize_t size[MAX_AXES]
    Py_ssize_t logits[MAX_AXES]
    Py_ssize_t labels[MAX_AXES]
    Py_ssize_t grad[MAX_AXES]

cdef struct Problem:
    const char *logits
    const char *labels
    char *grad  # NULL for the sums
    Py_ssize_t logits_n, logits_c, labels_n, labels_c, grad_n, grad_c  # byte strides of samples and channels
    Py_ssize_t samples, channels, classes, voxels
    Axes axes
    int dtype
    Py_ssize_t itemsize  # bytes of a logit
    Py_ssize_t real_size  # bytes of a number in computations, 4 or 8
    # class labels
    int label_size  # bytes
    uint32_t label_limit  # labels below it, as unsigned bits, are classes
    bint has_ignore
    uint64_t ignore  # bits
    # soft or binary targets
    bint soft_targets, binary_targets
    int target_dtype
    double ignore_target
    # what is summed
    bint plain  # whether this is a softmax and class labels, without NLL
    bint needs_softmax
    bint few_voxels  # per sample: lanes are samples, and a work item is a block of them
    int activation
    Py_ssize_t p
    Py_ssize_t sums  # K
    Py_ssize_t row[ROWS]  # of each sum on the K axis, -1 if not requested
    bint cross_entropy, nll, binary_cross_entropy, target_square
    bint focal  # gamma > 0
    double gamma, binary_gamma
    Py_ssize_t integer_gamma, integer_binary_gamma  # if gamma is a small integer, else 0
    # how the work is done
    bint non_temporal  # how the gradient is stored
    Py_ssize_t line, block, chunk  # voxels
    Py_ssize_t chunks  # of a sample
    Py_ssize_t items  # of work, for the threads

cdef struct Scratch:
    # The memory of one thread. Numbers are floats, for float64 logits doubles.
    char *staged  # (channels, block) logits or gradient, in the dtype of the logits
    char *e  # (classes, block) exponentials
    char *scale  # (block,) one over their sum
    char *nll  # (block,) each voxel's part of H; before that, the exponential of its own class
    char *rest  # (block,) the sum of the other classes' exponentials
    char *dot  # (block,) the same of their products with the derivatives with respect to the probabilities
    char *slope  # (block,) the derivative with respect to the probability of the own class
    char *own  # (block,) the exponential of the own class; then its gradient over that
    char *label  # (TILE,), or (block,) of few voxels: class, -1 if ignored, -2 if out of range
    char *targets  # (classes, block) soft targets, -1 if ignored or out of range
    char *binary  # (classes, block) gradient of B+ and B-
    char *top  # (3, block) nll and logit of the most probable class, and the others' probability
    char *sums  # (K, classes) vectors; of few voxels (K, block, classes) doubles
    char *cotangent  # (ROWS, classes), or of few voxels (4, classes, block)


include "cpu/memory.pxi"
include "cpu/labels.pxi"
include "cpu/softmax.pxi"
include "cpu/binary.pxi"
include "cpu/plain.pxi"
include "cpu/general.pxi"
include "cpu/chunk.pxi"
include "cpu/ratio.pxi"
include "cpu/samples.pxi"


# ---- all chunks ------------------------------------------------------------------------------------------------------

cdef class Workspace:
    """One Scratch per thread and the sums of the chunks, allocated before the parallel loop, in which MemoryError could
    not be raised.
    """

    cdef char *memory
    cdef Scratch *of_thread
    cdef double *partial  # (samples, chunks, K, classes); NULL for the gradient, and for few voxels

    def __cinit__(self):
        self.memory = NULL
        self.of_thread = NULL
        self.partial = NULL

    def __dealloc__(self):
        free(self.memory)
        free(self.of_thread)
        free(self.partial)

    cdef int allocate(self, const Problem *q, Py_ssize_t threads) except -1:
        # Whole cache lines, so that no two threads share one.
        cdef Py_ssize_t row = padded(q.block * q.real_size, CACHE_LINE)
        cdef Py_ssize_t rows = padded(q.classes * q.block * q.real_size, CACHE_LINE)
        cdef Py_ssize_t label = padded(max(TILE, q.block) * q.real_size, CACHE_LINE)
        cdef Py_ssize_t targets = rows if q.soft_targets else 0
        cdef Py_ssize_t binary = rows if q.plain and q.binary_cross_entropy else 0
        cdef Py_ssize_t top = 0 if q.plain else 3 * row
        cdef Py_ssize_t sums = padded(q.sums * q.classes * vector_size(q), CACHE_LINE)
        cdef Py_ssize_t cotangent = padded(ROWS * q.classes * q.real_size, CACHE_LINE)
        if q.few_voxels:
            sums = q.sums * q.classes * q.block * sizeof(double) if q.grad == NULL else 0
            cotangent = NLL * rows if q.grad != NULL else 0
        cdef Py_ssize_t size = PAGE + 2 * rows + 6 * row + label + targets + binary + top + sums + cotangent
        cdef Py_ssize_t i
        cdef Scratch *t
        cdef char *at
        self.memory = <char *>malloc(threads * size + CACHE_LINE)
        self.of_thread = <Scratch *>malloc(threads * sizeof(Scratch))
        cdef bint partial = q.grad == NULL and not q.few_voxels
        if partial:
            self.partial = <double *>calloc(max(1, q.samples * q.chunks * q.sums * q.classes), sizeof(double))
        if self.memory == NULL or self.of_thread == NULL or (partial and self.partial == NULL):
            raise MemoryError
        at = <char *>padded(<Py_ssize_t><uintptr_t>self.memory, CACHE_LINE)
        for i in range(threads):
            t = &self.of_thread[i]
            t.staged = at
            t.sums = t.staged + rows
            t.cotangent = t.sums + sums
            t.e = t.cotangent + cotangent
            t.scale = t.e + rows
            t.nll = t.scale + row
            t.rest = t.nll + row
            t.dot = t.rest + row
            t.slope = t.dot + row
            t.own = t.slope + row
            t.label = t.own + row
            t.targets = t.label + label
            t.binary = t.targets + targets
            t.top = t.binary + binary  # (3, block), and a page for `move_scratch`
            if not q.few_voxels:
                memset(t.sums, 0, sums)
            at += size
        return 0


cdef inline Py_ssize_t small_integer(double gamma) noexcept:
    """gamma, if it is an integer up to MAX_INTEGER_GAMMA, else 0."""
    return <Py_ssize_t>gamma if gamma <= MAX_INTEGER_GAMMA and gamma == <Py_ssize_t>gamma else 0


cdef int describe(Problem *q, logits_buffer, labels_buffer, grad_buffer, spec) except -1:
    """The problem of these Buffers; grad_buffer is None for the sums."""
    cdef Py_ssize_t size, lines, most, blocks
    cdef bint in_place
    cdef int i
    logits, labels = logits_buffer.layout, labels_buffer.layout
    grad = logits if grad_buffer is None else grad_buffer.layout
    q.logits = <const char *><uintptr_t>logits_buffer.address
    q.labels = <const char *><uintptr_t>labels_buffer.address
    q.grad = NULL if grad_buffer is None else <char *><uintptr_t>grad_buffer.address
    q.dtype = _DTYPES[logits.dtype]
    q.itemsize = logits.itemsize
    q.real_size = max(4, q.itemsize)
    shape, logits_strides, labels_strides, grad_strides = logits.shape, logits.strides, labels.strides, grad.strides
    q.samples, q.channels = shape[:2]
    q.classes = spec.classes(q.channels)
    q.logits_n, q.logits_c = logits_strides[:2]
    q.labels_n = labels_strides[0]
    q.grad_n, q.grad_c = grad_strides[:2]

    q.plain = spec.activation == "softmax" and not (spec.nll or spec.soft_targets)
    q.needs_softmax = spec.needs_softmax
    q.activation = _ACTIVATIONS[spec.activation]
    q.p = spec.p
    q.sums = len(spec.fields)
    for i in range(ROWS):
        q.row[i] = -1
    for i, name in enumerate(spec.fields):
        q.row[<int>_ROWS[name]] = i
    q.cross_entropy = q.row[CROSS_ENTROPY] >= 0
    q.nll = q.row[NLL] >= 0
    q.binary_cross_entropy = q.row[POSITIVE] >= 0
    q.target_square = q.row[TARGET_SQUARE] >= 0
    q.gamma = spec.gamma or 0
    q.focal = q.gamma > 0
    q.integer_gamma = small_integer(q.gamma)
    q.binary_gamma = spec.binary_gamma or 0
    q.integer_binary_gamma = small_integer(q.binary_gamma)

    ignore = spec.ignore_label
    q.soft_targets = spec.soft_targets
    if q.soft_targets:
        q.binary_targets = spec.targets == "binary"
        q.target_dtype = _DTYPES[labels.dtype]
        q.labels_c = labels_strides[1]
        q.has_ignore = ignore is not None and (labels.dtype != "bool" or ignore in (0, 1))
        q.ignore_target = float(ignore or 0)
    else:
        low, high = _LABELS[labels.dtype]
        q.label_size = labels.itemsize
        q.label_limit = min(high + 1, q.classes)
        q.has_ignore = ignore is not None and low <= ignore <= high
        q.ignore = (ignore if q.has_ignore else 0) & (2 ** (8 * labels.itemsize) - 1)
    q.voxels = 1
    q.axes.count = 0
    for i in range(2, len(shape)):
        size = shape[i]
        q.voxels *= size
        if size != 1:
            add_axis(&q.axes, size, logits_strides[i], labels_strides[i if q.soft_targets else i - 1], grad_strides[i])
    merge_axes(&q.axes)

    # A non-temporal store avoids reading a cache line that is about to be overwritten completely. With few classes it
    # does not pay off on fresh pages, which are still in the caches because the operating system has just cleared them,
    # and with two nowhere. Where it would be a normal store, the loops for it are not used: the compiler may fuse other
    # multiplications and additions there, and the last bit of the gradient would depend on its alignment.
    q.non_temporal = (
        HAS_NON_TEMPORAL and q.grad != NULL and q.grad != q.logits and q.axes.count == 1
        and not (<uintptr_t>q.grad | <uintptr_t>q.grad_n | <uintptr_t>q.grad_c) % CACHE_LINE
        and (q.classes > FEW_CLASSES or (q.classes > 2 and is_resident(q.grad, q.voxels * q.itemsize)))
    )
    q.line = VECTORS * vector_size(q) // q.real_size
    q.few_voxels = (
        q.plain and not q.binary_cross_entropy and 0 < q.voxels < q.line and q.voxels <= q.samples
        and q.classes * q.line <= LARGE_BLOCK
    )
    # Blocks of about equal size, in an odd number of lines, so that the rows of the classes do not share cache sets.
    # Large ones let the next class be prefetched, but not if the logits go through scratch.
    in_place = q.axes.logits[q.axes.count - 1] == q.itemsize and not q.few_voxels
    most = BLOCK // 4 if q.few_voxels else LARGE_BLOCK if q.classes > FEW_CLASSES and in_place else BLOCK
    most = max(1, most // (q.classes * q.line))
    lines = padded(max(1, min(TILE, q.samples if q.few_voxels else q.voxels)), q.line) // q.line
    blocks = (lines + most - 1) // most
    q.block = ((lines + blocks - 1) // blocks | 1) * q.line
    q.chunk = max(CHUNK_NUMBERS // q.classes, (q.voxels + MAX_CHUNKS - 1) // MAX_CHUNKS, 1)
    q.chunk = padded(q.chunk, CHUNK_STEP)
    q.chunks = (q.voxels + q.chunk - 1) // q.chunk
    q.items = (q.samples + q.block - 1) // q.block if q.few_voxels else q.samples * q.chunks
    return 0


cdef int team(const Problem *q, threads) except -1:
    """The number of threads, limited so that each has enough work."""
    cdef Py_ssize_t numbers = FEW_THREAD_NUMBERS if q.few_voxels else THREAD_NUMBERS
    cdef Py_ssize_t worth = q.samples * q.voxels * q.classes // numbers
    return usable_threads(max(1, min(worth, threads, q.items)))


cdef struct Job:
    const Problem *q
    const Scratch *of_thread
    const double *cotangent
    double *sums
    # for few voxels, whose sums are needed only for the ratio if `sums` is NULL:
    const Ratio *ratio
    const double *weight
    double *parts  # (samples,) of the loss
    double *totals  # (3, items, classes), if the ratio pools samples


cdef Py_ssize_t run_block(const Job *job, Py_ssize_t item, const Scratch *t) noexcept nogil:
    """One block of samples of a Job. Returns the number of out-of-range labels."""
    cdef const Problem *q = job.q
    cdef Py_ssize_t first = item * q.block, n = min(q.block, q.samples - first), k, row, out_of_range
    cdef double *sums
    if job.sums == NULL:
        sums, row = <double *>t.sums, q.block * q.classes
    else:
        sums, row = job.sums + first * q.classes, q.samples * q.classes
    if q.dtype == FLOAT16:
        out_of_range = run_samples(q, first, t, job.cotangent, sums, row, <float16 *>t.staged)
    elif q.dtype == BFLOAT16:
        out_of_range = run_samples(q, first, t, job.cotangent, sums, row, <bfloat16 *>t.staged)
    elif q.dtype == FLOAT32:
        out_of_range = run_samples(q, first, t, job.cotangent, sums, row, <float *>t.staged)
    else:
        out_of_range = run_samples(q, first, t, job.cotangent, sums, row, <double *>t.staged)
    if job.totals != NULL:
        for k in range(3):
            pool_samples(sums + k * row, n, q.classes)
            memcpy(job.totals + (k * q.items + item) * q.classes, sums + k * row, q.classes * sizeof(double))
    elif job.ratio != NULL:
        run_ratio(job.ratio, job.weight, n, q.classes, row, sums, job.parts + first, job.sums != NULL)
    return out_of_range


cdef Py_ssize_t run_item(const void *arguments, Py_ssize_t item, int thread) noexcept nogil:
    """One chunk, or block of samples, of a Job. Returns the number of out-of-range labels."""
    cdef const Job *job = <const Job *>arguments
    cdef const Scratch *t = &job.of_thread[thread]
    if job.q.few_voxels:
        return run_block(job, item, t)
    if job.q.dtype == FLOAT16:
        return run_chunk(job.q, item, t, job.cotangent, job.sums, <float16 *>NULL)
    if job.q.dtype == BFLOAT16:
        return run_chunk(job.q, item, t, job.cotangent, job.sums, <bfloat16 *>NULL)
    if job.q.dtype == FLOAT32:
        return run_chunk(job.q, item, t, job.cotangent, job.sums, <float *>NULL)
    return run_chunk(job.q, item, t, job.cotangent, job.sums, <double *>NULL)


cdef Py_ssize_t run_job(Job *job, Workspace workspace, int workers) except -1:
    """Every work item. Returns the number of out-of-range labels."""
    cdef const Problem *q = job.q
    cdef bint interruptible = (
        q.samples * q.voxels * q.classes > SIGNAL_NUMBERS and threading.get_ident() == threading.main_thread().ident
    )
    job.of_thread = workspace.of_thread
    return parallel(run_item, job, q.items, workers, interruptible)


# ---- entry points ----------------------------------------------------------------------------------------------------

cdef Py_ssize_t run_sums(const Problem *q, threads, double *sums) except -1:
    """Fills sums, (K, N, C). Returns the number of out-of-range labels or targets."""
    cdef Workspace workspace = Workspace()
    cdef int workers = team(q, threads)
    workspace.allocate(q, workers)
    cdef const double *partial = workspace.partial
    cdef Job job = Job(q, NULL, NULL, sums, NULL, NULL, NULL, NULL)
    if q.few_voxels:
        return run_job(&job, workspace, workers)
    job.sums = workspace.partial
    cdef Py_ssize_t out_of_range = run_job(&job, workspace, workers)
    with nogil:
        add_chunks(q, partial, sums)
    return out_of_range


def statistics(logits, labels, sums, spec, threads):
    """Fills sums, (K, N, C) contiguous float64. Returns the number of out-of-range labels or targets."""
    cdef Problem q
    describe(&q, logits, labels, None, spec)
    return run_sums(&q, threads, <double *><uintptr_t>sums.address)


def loss(logits, labels, value, derivative, spec, ratio, weight, threads):
    """Fills value, one number or (N,), and derivative, (K, N, C) contiguous float64 or None, for a `losses.Ratio` with
    class weights (C,) float64 or None. Returns how many labels or targets are out of range.
    """
    cdef Problem q
    describe(&q, logits, labels, None, spec)
    cdef Ratio r = read_ratio(ratio)
    cdef double *out = NULL if derivative is None else <double *><uintptr_t>derivative.address
    cdef const double *weights = NULL if weight is None else <const double *><uintptr_t>weight.address
    cdef Py_ssize_t samples = max(1, q.samples), row = q.samples * q.classes, out_of_range, k
    cdef Py_ssize_t count = q.items if q.few_voxels else q.samples  # of sums that are pooled
    cdef Py_ssize_t size = 3 * count * q.classes if r.pooled and q.few_voxels else 0 if out != NULL else q.sums * row
    cdef double *parts = <double *>malloc((samples + size) * sizeof(double))
    cdef double *at = parts + samples if size else out
    cdef Workspace workspace
    cdef Job job
    cdef int workers
    if parts == NULL:
        raise MemoryError
    try:
        if q.few_voxels:
            job = Job(&q, NULL, NULL, out, &r, weights, parts, NULL)
            if r.pooled:
                job.sums, job.totals = NULL, at
            workers = team(&q, threads)
            workspace = Workspace()
            workspace.allocate(&q, workers)
            out_of_range = run_job(&job, workspace, workers)
        else:
            out_of_range = run_sums(&q, threads, at)
        with nogil:
            if r.pooled:
                for k in range(3):
                    pool_samples(at + k * count * q.classes, count, q.classes)
                run_ratio(&r, weights, 1, q.classes, count * q.classes, at, parts, True)
                for k in range(3 if out != NULL else 0):
                    if at != out:
                        memcpy(out + k * row, at + k * count * q.classes, q.classes * sizeof(double))
                    repeat_sample(out + k * row, q.samples, q.classes)
            elif not q.few_voxels:
                run_ratio(&r, weights, q.samples, q.classes, row, at, parts, out != NULL)
            if out != NULL:
                memset(out + 3 * row, 0, (q.sums - 3) * row * sizeof(double))
        samples = 1 if r.pooled else q.samples
        if value.layout.dtype == "float32":
            finish_ratio(&r, samples, parts, <float *><uintptr_t>value.address)
        else:
            finish_ratio(&r, samples, parts, <double *><uintptr_t>value.address)
    finally:
        free(parts)
    return out_of_range


def gradient(logits, labels, cotangent, grad, spec, threads):
    """Fills grad, of the logits' shape and dtype, for a cotangent (K, N, C) contiguous float64. Returns the number of
    out-of-range labels or targets.
    """
    cdef Problem q
    describe(&q, logits, labels, grad, spec)
    cdef int workers = team(&q, threads)
    cdef Workspace workspace = Workspace()
    workspace.allocate(&q, workers)
    cdef Job job = Job(&q, NULL, <const double *><uintptr_t>cotangent.address, NULL, NULL, NULL, NULL, NULL)
    return run_job(&job, workspace, workers)


def elementwise(name, x, out):
    """Fills out with the kernels' exp or log of x, for their tests; float32 or float64, a multiple of 64 numbers."""
    cdef Py_ssize_t i
    cdef const char *numbers = <const char *><uintptr_t>x.address
    cdef char *to = <char *><uintptr_t>out.address
    cdef f32 v
    cdef f64 w
    cdef bint exponential = name == "exp"
    if x.dtype == "float32":
        for i in range(x.shape[0] // lanes(&v)):
            load(&v, <const float *>(numbers + i * sizeof(f32)))
            store(<float *>(to + i * sizeof(f32)), exp(v) if exponential else log(v, constant(&v, 1) - v))
    else:
        for i in range(x.shape[0] // lanes(&w)):
            load(&w, <const double *>(numbers + i * sizeof(f64)))
            store(<double *>(to + i * sizeof(f64)), exp(w) if exponential else log(w, constant(&w, 1) - w))


def unsupported(signature):
    """The reasons why these kernels do not support such calls; empty if they do."""
    reasons = []
    shape = signature.logits.shape
    if len(shape) > MAX_AXES:
        reasons.append(f"supports at most {MAX_AXES} axes, not {len(shape)}")
    if shape[1] > MAX_CLASSES:
        reasons.append(f"supports at most {MAX_CLASSES} classes, not {shape[1]}")
    return reasons


LEVEL = DICE_LEVEL.decode()
watch_forks()


def processor_runs(level):
    """Whether this processor runs code compiled for `level`, "x86-64-v3" or "x86-64-v4"."""
    return bool(processor_supports({"x86-64-v3": 3, "x86-64-v4": 4}[level]))


def openmp():
    """(version, library): the date of the OpenMP standard, 0 without OpenMP, and the file of its runtime library."""
    return DICE_OPENMP, openmp_library().decode()
