# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""Dice statistics and their gradient on the CPU.

Design
------
1. Summed, per sample and class over the counted voxels: I = sum s_c [y=c], P = sum s_c^p, Y = sum [y=c] with
   s = softmax(x); one channel scores two classes, (1 - sigmoid(x), sigmoid(x)). The gradient is the vector-Jacobian
   product of the sums.
2. Precision: voxel arithmetic in the logits' dtype, sums over one tile (at most 1024 voxels) too, all else in float64.
3. A chunk is a fixed run of a sample's voxels, its length a function of shape alone; a thread owns whole chunks.
4. Chunks are added in order after the parallel loop: the same bits for any number of threads.
5. Any strides: voxels are visited along the logits' strides, axes merged where memory allows. Tiles with unit stride
   are read where they lie, others are gathered into scratch; gradients are stored the same two ways.
6. A tile is read whole before its gradient is written, so the gradient may overwrite the logits.
7. Ignored voxels are selected away, never multiplied by zero: their NaN and infinities cannot leak.
8. Never allocated: anything of image size. Scratch is one tile per thread, partial sums are 3 C numbers per chunk.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport (
    int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t,
)
from libc.stdlib cimport calloc, free, malloc

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* 2**n for t = n + 1.5 * 2**23 (2**52): the sum's low mantissa bits are n, moved to the exponent. */
    static inline float exp2_of_shifted(float t) {
        uint32_t bits; memcpy(&bits, &t, sizeof bits);
        bits = (bits + 127u) << 23;
        memcpy(&t, &bits, sizeof t); return t;
    }
    static inline double exp2_of_shifted64(double t) {
        uint64_t bits; memcpy(&bits, &t, sizeof bits);
        bits = (bits + 1023u) << 52;
        memcpy(&t, &bits, sizeof t); return t;
    }

    #if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
    #define DICE_LEVEL "x86-64-v4"
    #elif defined(__AVX2__) && defined(__FMA__)
    #define DICE_LEVEL "x86-64-v3"
    #elif defined(__x86_64__) || defined(_M_X64)
    #define DICE_LEVEL "x86-64"
    #elif defined(__aarch64__) || defined(_M_ARM64)
    #define DICE_LEVEL "arm64"
    #else
    #define DICE_LEVEL "generic"
    #endif

    /* Whether this processor and its operating system run code of the level. Every processor with AVX2, FMA and
       BMI2 has the rest of x86-64-v3 (F16C, LZCNT, MOVBE) too, which older compilers cannot ask for by name. */
    static int processor_has(int v) {
    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")))
            return 0;
        return v < 4 || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl"));
    #else
        return v == 0;
    #endif
    }

    #if defined(_OPENMP)
    #include <omp.h>
    #define DICE_OPENMP _OPENMP
    #else
    #define DICE_OPENMP 0
    #endif
    #if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
    #include <dlfcn.h>
    static const char *openmp_library(void) {
        Dl_info info;
        return dladdr((void *)(uintptr_t)omp_get_max_threads, &info) && info.dli_fname ? info.dli_fname : "";
    }
    #else
    static const char *openmp_library(void) { return ""; }
    #endif
    """
    float exp2_of_shifted(float) noexcept nogil
    double exp2_of_shifted64(double) noexcept nogil
    int processor_has(int) noexcept
    const char *openmp_library() noexcept
    const char *DICE_LEVEL
    int DICE_OPENMP

cdef enum:
    MAX_AXES = 64
    LANES = 16
    TILE_VOXELS = 1024  # most voxels of a tile: the run that is summed in the logits' dtype
    TILE_SCORES = 8192  # most scores of a tile, so that it stays in the first two cache levels
    CHUNK_SCORES = 65536
    MAX_CHUNKS = 256
    CACHE_LINE = 64

ctypedef fused real:
    float
    double

ctypedef fused label_t:
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t
    uint64_t

# label dtype -> (code, smallest, largest)
_LABELS = {
    "bool": (0, 0, 1),
    "uint8": (0, 0, 2**8 - 1),
    "int8": (1, -(2**7), 2**7 - 1),
    "uint16": (2, 0, 2**16 - 1),
    "int16": (3, -(2**15), 2**15 - 1),
    "uint32": (4, 0, 2**32 - 1),
    "int32": (5, -(2**31), 2**31 - 1),
    "uint64": (6, 0, 2**64 - 1),
    "int64": (7, -(2**63), 2**63 - 1),
}

cdef struct Axes:
    # The voxels of one sample: merged spatial axes, outermost first, with the byte strides of each array.
    int count
    Py_ssize_t size[MAX_AXES]
    Py_ssize_t logits[MAX_AXES]
    Py_ssize_t labels[MAX_AXES]
    Py_ssize_t grad[MAX_AXES]

cdef struct Problem:
    const char *logits
    const char *labels
    char *grad
    Py_ssize_t logits_n, logits_c, labels_n, grad_n, grad_c  # byte strides of sample and channel
    Py_ssize_t samples, channels, classes, voxels
    Axes axes
    int label_code
    bint has_ignore
    uint64_t ignore
    Py_ssize_t power
    Py_ssize_t tile, chunk, chunks  # voxels of a tile, voxels of a chunk, chunks of a sample
    bint single  # float32, else float64

cdef struct Tile:
    # One thread's scratch: `scores` is (classes, tile), the rows are (tile,).
    char *scores
    char *row0
    char *row1
    char *row2
    int32_t *label


# ---- one number ------------------------------------------------------------------------------------------------------

cdef inline real exp_of_nonpositive(real x) noexcept nogil:
    """exp(x) for x <= 0 within 1.2 ulp: 2^n e^r, |r| <= ln(2)/2; 0 below the smallest normal number; NaN for NaN."""
    cdef real t, n, r, y
    if real is float:
        t = x * <float>1.4426950408889634 + <float>12582912.0
        n = t - <float>12582912.0
        r = (x - n * <float>0.693115234375) - n * <float>3.1946183e-05
        y = <float>0.001392618359
        y = y * r + <float>0.008363179053
        y = y * r + <float>0.04166655462
        y = y * r + <float>0.1666657699
        y = y * r + <float>0.5
        y = (y * (r * r) + r) + 1
        y = y * exp2_of_shifted(t)
        return 0 if x < <float>-87.33 else y
    else:
        t = x * 1.4426950408889634 + 6755399441055744.0
        n = t - 6755399441055744.0
        r = (x - n * 0.6931467056274414) - n * 4.7493250390316726e-07
        y = 2.51003854955103191e-8
        y = y * r + 2.76200884454097482e-7
        y = y * r + 2.75572684599970648e-6
        y = y * r + 2.48015212959543751e-5
        y = y * r + 1.98412698630536169e-4
        y = y * r + 1.38888889172137169e-3
        y = y * r + 8.33333333333006183e-3
        y = y * r + 4.16666666666241279e-2
        y = y * r + 0.166666666666666675
        y = y * r + 0.5
        y = (y * (r * r) + r) + 1
        y = y * exp2_of_shifted64(t)
        return 0 if x < -708.39 else y


# ---- one row of a tile -----------------------------------------------------------------------------------------------

cdef inline double sum_row(const real *row, Py_ssize_t n) noexcept nogil:
    """Sum of n numbers, n a multiple of LANES, in LANES interleaved partial sums."""
    cdef real lanes[LANES]
    cdef double total = 0
    cdef Py_ssize_t v
    cdef int k
    for k in range(LANES):
        lanes[k] = 0
    for v in range(n // LANES):
        for k in range(LANES):
            lanes[k] += row[v * LANES + k]
    for k in range(LANES):
        total += lanes[k]
    return total


cdef inline int32_t count_of_class(const int32_t *label, int32_t c, Py_ssize_t n) noexcept nogil:
    cdef int32_t count = 0
    cdef Py_ssize_t v
    for v in range(n):
        count += label[v] == c
    return count


cdef inline const real *class_row(
    const real *row, const int32_t *label, int32_t c, real *out, Py_ssize_t n
) noexcept nogil:
    """The row where the label is c, else 0."""
    cdef Py_ssize_t v
    # Apart from the sum: GCC 12.2 with AVX2 loses terms when a conditional is added to an array of lanes.
    for v in range(n):
        out[v] = row[v] if label[v] == c else 0
    return out


cdef inline const real *power_row(const real *row, Py_ssize_t p, real *out, real *square, Py_ssize_t n) noexcept nogil:
    """row**p by repeated squaring; `row` itself for p = 1."""
    cdef Py_ssize_t v
    if p == 1:
        return row
    for v in range(n):
        out[v] = 1
        square[v] = row[v]
    while p:
        if p & 1:
            for v in range(n):
                out[v] *= square[v]
        p >>= 1
        if p:
            for v in range(n):
                square[v] *= square[v]
    return out


cdef inline int32_t class_of(label_t k, bint has_ignore, label_t ignore, uint64_t classes) noexcept nogil:
    """The class index; -1 for the ignored label, -2 for one out of range."""
    cdef int32_t c = <int32_t>k if <uint64_t>k < classes else -2
    return -1 if has_ignore and k == ignore else c


cdef Py_ssize_t load_label_row(
    const label_t *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, int32_t *out
) noexcept nogil:
    """Class indices of n labels, negative where they do not count. Returns how many were out of range."""
    cdef Py_ssize_t v
    cdef label_t ignore = <label_t>q.ignore
    cdef uint64_t classes = q.classes
    cdef bint has_ignore = q.has_ignore
    if stride == sizeof(label_t):
        for v in range(n):
            out[v] = class_of(y[v], has_ignore, ignore, classes)
    else:
        for v in range(n):
            out[v] = class_of((<const label_t *>(<const char *>y + v * stride))[0], has_ignore, ignore, classes)
    return count_of_class(out, -2, n)


cdef Py_ssize_t load_labels(
    const char *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, int32_t *out
) noexcept nogil:
    if q.label_code == 0:
        return load_label_row(<const uint8_t *>y, stride, n, q, out)
    if q.label_code == 1:
        return load_label_row(<const int8_t *>y, stride, n, q, out)
    if q.label_code == 2:
        return load_label_row(<const uint16_t *>y, stride, n, q, out)
    if q.label_code == 3:
        return load_label_row(<const int16_t *>y, stride, n, q, out)
    if q.label_code == 4:
        return load_label_row(<const uint32_t *>y, stride, n, q, out)
    if q.label_code == 5:
        return load_label_row(<const int32_t *>y, stride, n, q, out)
    if q.label_code == 6:
        return load_label_row(<const uint64_t *>y, stride, n, q, out)
    return load_label_row(<const int64_t *>y, stride, n, q, out)


# ---- one tile --------------------------------------------------------------------------------------------------------

cdef struct Place:
    # Byte offsets of a voxel within its sample, and how many voxels follow it along the innermost axis.
    Py_ssize_t logits, labels, grad, run


cdef inline Place locate(const Axes *axes, Py_ssize_t voxel) noexcept nogil:
    cdef Place at
    cdef Py_ssize_t i, last = axes.count - 1
    i = voxel % axes.size[last]
    at.run = axes.size[last] - i
    at.logits = i * axes.logits[last]
    at.labels = i * axes.labels[last]
    at.grad = i * axes.grad[last]
    voxel //= axes.size[last]
    while last > 0:
        last -= 1
        i = voxel % axes.size[last]
        voxel //= axes.size[last]
        at.logits += i * axes.logits[last]
        at.labels += i * axes.labels[last]
        at.grad += i * axes.grad[last]
    return at


cdef inline Py_ssize_t padded(Py_ssize_t n) noexcept nogil:
    return (n + LANES - 1) // LANES * LANES


cdef inline void sigmoid_row(real *x, const int32_t *label, real *background, Py_ssize_t n) noexcept nogil:
    """Scores of a single channel: the foreground's over its logits, the background's beside them."""
    cdef Py_ssize_t v
    cdef real e, larger, smaller
    for v in range(n):
        e = exp_of_nonpositive[real](-x[v] if x[v] > 0 else x[v])
        larger = 1 / (1 + e)
        larger = larger if label[v] >= 0 else 0
        smaller = e * larger if label[v] >= 0 else 0
        background[v] = smaller if x[v] > 0 else larger
        x[v] = larger if x[v] > 0 else smaller


cdef Py_ssize_t score_tile(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, const Tile *t, real *s
) noexcept nogil:
    """Fills t.label and the scores s of n voxels; rows are padded with ignored voxels. Returns how many bad labels."""
    cdef const char *x = q.logits + sample * q.logits_n
    cdef const char *y = q.labels + sample * q.labels_n
    cdef Py_ssize_t x_stride = q.axes.logits[q.axes.count - 1]
    cdef Py_ssize_t y_stride = q.axes.labels[q.axes.count - 1]
    cdef real largest = <real>3.4028234663852886e38 if real is float else <real>1.7976931348623157e308
    cdef Py_ssize_t done, run, c, v, bad = 0
    cdef Py_ssize_t extra = q.classes - q.channels  # row 0 is the background of a single channel
    cdef real *top = <real *>t.row0
    cdef real *scale = <real *>t.row1
    cdef int32_t *label = t.label
    cdef const char *source = <const char *>s
    cdef Py_ssize_t source_row = q.tile * sizeof(real)
    cdef const char *from_
    cdef const real *row
    cdef real *to
    cdef real d
    cdef Place at = locate(&q.axes, first)

    if at.run >= n and x_stride == sizeof(real) and not extra:
        source = x + at.logits
        source_row = q.logits_c
        bad = load_labels(y + at.labels, y_stride, n, q, label)
    else:
        done = 0
        while True:
            run = min(at.run, n - done)
            bad += load_labels(y + at.labels, y_stride, run, q, label + done)
            for c in range(q.channels):
                from_ = x + at.logits + c * q.logits_c
                to = s + (extra + c) * q.tile + done
                for v in range(run):
                    to[v] = (<const real *>(from_ + v * x_stride))[0]
            done += run
            if done == n:
                break
            at = locate(&q.axes, first + done)

    for v in range(n, padded(n)):
        label[v] = -1
    if extra:
        sigmoid_row(s + q.tile, label, s, n)
        for c in range(2):
            for v in range(n, padded(n)):
                s[c * q.tile + v] = 0
        return bad

    row = <const real *>source
    for v in range(n):
        top[v] = row[v]
    for c in range(1, q.classes):
        row = <const real *>(source + c * source_row)
        for v in range(n):
            top[v] = row[v] if row[v] > top[v] else top[v]
    for v in range(n):
        # With a finite reference +inf scores 1 and a voxel of nothing but -inf scores NaN.
        top[v] = largest if top[v] > largest else top[v]
        top[v] = -largest if top[v] < -largest else top[v]
        scale[v] = 0

    for c in range(q.classes):
        row = <const real *>(source + c * source_row)
        to = s + c * q.tile
        for v in range(n):
            d = row[v] - top[v]
            d = exp_of_nonpositive[real](0 if d > 0 else d)
            d = d if label[v] >= 0 else 0
            to[v] = d
            scale[v] += d
    for v in range(n):
        scale[v] = 1 / scale[v] if label[v] >= 0 else 0

    for c in range(q.classes):
        to = s + c * q.tile
        for v in range(n):
            to[v] *= scale[v]
        for v in range(n, padded(n)):
            to[v] = 0
    return bad


# ---- one chunk -------------------------------------------------------------------------------------------------------

cdef Py_ssize_t sum_chunk(
    const Problem *q, Py_ssize_t index, const Tile *t, double *sums, real *s
) noexcept nogil:
    """Adds the three statistics of one chunk to sums, (3, classes). Returns how many bad labels."""
    cdef Py_ssize_t sample = index // q.chunks
    cdef Py_ssize_t first = index % q.chunks * q.chunk
    cdef Py_ssize_t stop = min(first + q.chunk, q.voxels)
    cdef Py_ssize_t n, m, c, bad = 0
    cdef Py_ssize_t C = q.classes
    cdef const real *row
    while first < stop:
        n = min(q.tile, stop - first)
        m = padded(n)
        bad += score_tile(q, sample, first, n, t, s)
        for c in range(C):
            row = s + c * q.tile
            sums[c] += sum_row(class_row(row, t.label, <int32_t>c, <real *>t.row0, m), m)
            sums[C + c] += sum_row(power_row(row, q.power, <real *>t.row0, <real *>t.row1, m), m)
            sums[2 * C + c] += count_of_class(t.label, <int32_t>c, m)
        first += n
    return bad


cdef Py_ssize_t grad_chunk(
    const Problem *q, Py_ssize_t index, const Tile *t, const double *cotangent, real *s
) noexcept nogil:
    """Writes the gradient of one chunk for the cotangents (3, samples, classes). Returns how many bad labels."""
    cdef Py_ssize_t sample = index // q.chunks
    cdef Py_ssize_t first = index % q.chunks * q.chunk
    cdef Py_ssize_t stop = min(first + q.chunk, q.voxels)
    cdef Py_ssize_t n, m, c, v, run, done, bad = 0
    cdef Py_ssize_t extra = q.classes - q.channels
    cdef Py_ssize_t stride = q.axes.grad[q.axes.count - 1]
    cdef const double *of_intersection = cotangent + sample * q.classes
    cdef const double *of_pred_sum = of_intersection + q.samples * q.classes
    cdef char *grad = q.grad + sample * q.grad_n
    cdef const int32_t *label = t.label
    cdef real *dot = <real *>t.row0
    cdef real *slope  # dP/ds = p s^(p-1)
    cdef real *row
    cdef real *to
    cdef char *into
    cdef real a, b
    cdef bint in_place
    cdef Place at
    while first < stop:
        n = min(q.tile, stop - first)
        m = padded(n)
        bad += score_tile(q, sample, first, n, t, s)
        for v in range(m):
            dot[v] = 0
        slope = <real *>t.row1
        for c in range(q.classes):
            row = s + c * q.tile
            a = <real>of_intersection[c]
            b = <real>(q.power * of_pred_sum[c])
            if q.power == 1:
                for v in range(m):
                    dot[v] += row[v] * ((a if label[v] == c else 0) + b)
            else:
                slope = <real *>power_row(row, q.power - 1, <real *>t.row1, <real *>t.row2, m)
                for v in range(m):
                    dot[v] += row[v] * ((a if label[v] == c else 0) + b * slope[v])

        at = locate(&q.axes, first)
        in_place = at.run < n or stride != sizeof(real)
        for c in range(extra, q.classes):
            row = s + c * q.tile
            to = row if in_place else <real *>(grad + at.grad + (c - extra) * q.grad_c)
            a = <real>of_intersection[c]
            b = <real>(q.power * of_pred_sum[c])
            if q.power == 1:
                for v in range(n):
                    to[v] = row[v] * ((a if label[v] == c else 0) + b - dot[v]) if label[v] >= 0 else 0
            else:
                slope = <real *>power_row(row, q.power - 1, <real *>t.row1, <real *>t.row2, m)
                for v in range(n):
                    to[v] = row[v] * ((a if label[v] == c else 0) + b * slope[v] - dot[v]) if label[v] >= 0 else 0
        if in_place:
            done = 0
            while True:
                run = min(at.run, n - done)
                for c in range(q.channels):
                    into = grad + at.grad + c * q.grad_c
                    row = s + (extra + c) * q.tile + done
                    for v in range(run):
                        (<real *>(into + v * stride))[0] = row[v]
                done += run
                if done == n:
                    break
                at = locate(&q.axes, first + done)
        first += n
    return bad


# ---- the whole problem -----------------------------------------------------------------------------------------------

cdef inline Py_ssize_t cache_lines(Py_ssize_t size) noexcept nogil:
    """Bytes, or an address, rounded up to whole cache lines, so that threads share none."""
    return (size + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef class Scratch:
    """One Tile per thread; raises MemoryError before the parallel region, where nothing could."""

    cdef char *memory
    cdef Tile *tiles

    def __cinit__(self):
        self.memory = NULL
        self.tiles = NULL

    def __dealloc__(self):
        free(self.memory)
        free(self.tiles)

    cdef int allocate(self, const Problem *q, Py_ssize_t threads) except -1:
        cdef Py_ssize_t size = sizeof(float) if q.single else sizeof(double)
        cdef Py_ssize_t scores = cache_lines(q.classes * q.tile * size)
        cdef Py_ssize_t row = cache_lines(q.tile * size)
        cdef Py_ssize_t labels = cache_lines(q.tile * sizeof(int32_t))
        cdef Py_ssize_t i
        cdef char *at
        self.memory = <char *>malloc(threads * (scores + 3 * row + labels) + CACHE_LINE)
        self.tiles = <Tile *>malloc(threads * sizeof(Tile))
        if self.memory == NULL or self.tiles == NULL:
            raise MemoryError
        at = <char *>cache_lines(<uintptr_t>self.memory)
        for i in range(threads):
            self.tiles[i].scores = at
            self.tiles[i].row0 = at + scores
            self.tiles[i].row1 = at + scores + row
            self.tiles[i].row2 = at + scores + 2 * row
            self.tiles[i].label = <int32_t *>(at + scores + 3 * row)
            at += scores + 3 * row + labels
        return 0


def _merged_axes(shape, *strides):
    """(size, strides) per axis, the first array's longest stride outermost, merged where every array allows it."""
    axes = sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: -abs(strides[0][a]))
    merged = []
    for a in axes:
        size, steps = shape[a], [s[a] for s in strides]
        if merged and merged[0][1] == [size * step for step in steps]:
            size *= merged.pop(0)[0]
        merged.insert(0, (size, steps))
    return merged[::-1] or [(1, [0] * len(strides))]


cdef int describe(Problem *q, logits, labels, grad, spec) except -1:
    q.single = logits.dtype == "float32"
    q.logits = <const char *><uintptr_t>logits.address
    q.labels = <const char *><uintptr_t>labels.address
    q.grad = <char *><uintptr_t>grad.address
    q.samples, q.channels = logits.shape[:2]
    q.classes = q.channels + (spec.activation == "sigmoid")  # a single channel has a background too
    q.logits_n, q.logits_c = logits.strides[:2]
    q.labels_n = labels.strides[0]
    q.grad_n, q.grad_c = grad.strides[:2]
    q.power = spec.power
    code, low, high = _LABELS[labels.dtype]
    q.label_code = code
    q.has_ignore = spec.ignore_label is not None and low <= spec.ignore_label <= high
    q.ignore = (spec.ignore_label if q.has_ignore else 0) & 0xFFFFFFFFFFFFFFFF
    q.voxels = 1
    for size in logits.shape[2:]:
        q.voxels *= size

    merged = _merged_axes(logits.shape[2:], logits.strides[2:], labels.strides[1:], grad.strides[2:])
    q.axes.count = len(merged)
    for i, (size, (x, y, d)) in enumerate(merged):
        q.axes.size[i] = size
        q.axes.logits[i] = x
        q.axes.labels[i] = y
        q.axes.grad[i] = d

    q.tile = max(LANES, min(TILE_VOXELS, TILE_SCORES // q.classes // LANES * LANES))
    q.chunk = max(CHUNK_SCORES // q.classes, (q.voxels + MAX_CHUNKS - 1) // MAX_CHUNKS, TILE_VOXELS)
    q.chunk = (q.chunk + TILE_VOXELS - 1) // TILE_VOXELS * TILE_VOXELS
    q.chunks = (q.voxels + q.chunk - 1) // q.chunk
    return 0


cdef int team(Py_ssize_t chunks, threads) except -1:
    return max(1, min(chunks, threads)) if DICE_OPENMP else 1


def statistics(logits, labels, sums, spec, threads):
    """Fills sums, (3, N, C) contiguous float64, with I, P and Y. Returns how many labels were out of range."""
    cdef Problem q
    describe(&q, logits, labels, logits, spec)
    cdef Py_ssize_t total = q.samples * q.chunks, width = 3 * q.classes
    cdef Py_ssize_t i, j, k, n, c, bad = 0
    cdef int workers = team(total, threads)
    cdef double *out = <double *><uintptr_t>sums.address
    cdef double part
    cdef Tile *t
    cdef Scratch scratch = Scratch()
    scratch.allocate(&q, workers)
    cdef double *partial = <double *>calloc(max(1, total * width), sizeof(double))
    if partial == NULL:
        raise MemoryError
    with nogil:
        for i in prange(total, num_threads=workers, schedule="static"):
            t = &scratch.tiles[threadid()]
            if q.single:
                bad += sum_chunk[float](&q, i, t, partial + i * width, <float *>t.scores)
            else:
                bad += sum_chunk[double](&q, i, t, partial + i * width, <double *>t.scores)
        for k in range(3):
            for n in range(q.samples):
                for c in range(q.classes):
                    part = 0
                    for j in range(q.chunks):
                        part = part + partial[(n * q.chunks + j) * width + k * q.classes + c]
                    out[(k * q.samples + n) * q.classes + c] = part
        free(partial)
    return bad


def gradient(logits, labels, cotangent, grad, spec, threads):
    """Fills grad, the logits' shape and dtype, for cotangents (3, N, C) contiguous float64. Returns the bad labels."""
    cdef Problem q
    describe(&q, logits, labels, grad, spec)
    cdef Py_ssize_t total = q.samples * q.chunks
    cdef Py_ssize_t i, bad = 0
    cdef int workers = team(total, threads)
    cdef const double *upstream = <const double *><uintptr_t>cotangent.address
    cdef Tile *t
    cdef Scratch scratch = Scratch()
    scratch.allocate(&q, workers)
    with nogil:
        for i in prange(total, num_threads=workers, schedule="static"):
            t = &scratch.tiles[threadid()]
            if q.single:
                bad += grad_chunk[float](&q, i, t, upstream, <float *>t.scores)
            else:
                bad += grad_chunk[double](&q, i, t, upstream, <double *>t.scores)
    return bad


def unsupported(call):
    """Reasons why these kernels do not take the call; none means they do."""
    reasons = []
    if call.logits.dtype not in ("float32", "float64"):
        reasons.append(f"takes float32 and float64 logits, not {call.logits.dtype}")
    if len(call.logits.shape) > MAX_AXES:
        reasons.append(f"takes at most {MAX_AXES} axes, not {len(call.logits.shape)}")
    return reasons


LEVEL = DICE_LEVEL.decode()


def processor_runs(level):
    """Whether this processor runs code compiled for `level`, one of "x86-64-v3" and "x86-64-v4"."""
    return bool(processor_has({"x86-64-v3": 3, "x86-64-v4": 4}[level]))


def openmp():
    """(version, library): the OpenMP date compiled against, 0 without OpenMP, and the file of the runtime in use."""
    return DICE_OPENMP, openmp_library().decode()
