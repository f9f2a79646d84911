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
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <stdint.h>

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
    int processor_has(int) noexcept
    const char *openmp_library() noexcept
    const char *DICE_LEVEL
    int DICE_OPENMP

cdef extern from "_vectors.h":
    # Vectors; to Cython they are numbers, and C applies + - * / to every lane.
    ctypedef float f32 "floats"
    ctypedef double f64 "doubles"
    enum:
        VECTORS  # in a line
    const float LN2  # and the rest of it, where products are rounded
    const float LN2_REST

    void PREFETCH(const void *) noexcept nogil
    f32 load_f16(const void *) noexcept nogil
    f32 load_bf16(const void *) noexcept nogil
    f32 load_floats(const void *) noexcept nogil
    f64 load_doubles(const void *) noexcept nogil
    void store_f16(void *, f32) noexcept nogil
    void store_bf16(void *, f32) noexcept nogil
    void store_floats(void *, f32) noexcept nogil
    void store_doubles(void *, f64) noexcept nogil
    f32 spread_floats(float) noexcept nogil
    f64 spread_doubles(double) noexcept nogil
    f32 max_floats(f32, f32) noexcept nogil
    f64 max_doubles(f64, f64) noexcept nogil
    f32 min_floats(f32, f32) noexcept nogil
    f64 min_doubles(f64, f64) noexcept nogil
    f32 equal_floats(f32, f32) noexcept nogil
    f64 equal_doubles(f64, f64) noexcept nogil
    f32 less_floats(f32, f32) noexcept nogil
    f64 less_doubles(f64, f64) noexcept nogil
    f32 where_floats(f32, f32) noexcept nogil
    f64 where_doubles(f64, f64) noexcept nogil
    f32 unless_floats(f32, f32) noexcept nogil
    f64 unless_doubles(f64, f64) noexcept nogil
    f32 exponent_floats(f32) noexcept nogil
    f32 larger_magnitude_floats(f32, f32) noexcept nogil
    f64 larger_magnitude_doubles(f64, f64) noexcept nogil
    bint any_above_floats(f32, float) noexcept nogil
    bint any_above_doubles(f64, double) noexcept nogil
    f64 exponent_doubles(f64) noexcept nogil
    f32 tally_floats(f32, f32) noexcept nogil
    f64 tally_doubles(f64, f64) noexcept nogil

cdef enum:
    MAX_AXES = 64
    TILE = 1024  # most voxels that are summed in the logits' arithmetic
    MAX_FEW = 8  # most classes whose scores are kept in registers
    FARTHEST = 80  # exp of so much is far from infinity, and so are sums of eight
    BLOCK_SCORES = 4096  # scores of a block in scratch, so that they stay in the first cache level
    ROWS_AHEAD = 2  # how early a row is asked for before it is gathered
    CHUNK_SCORES = 65536
    MAX_CHUNKS = 256
    CACHE_LINE = 64

ctypedef uint16_t float16
ctypedef int16_t bfloat16

ctypedef fused vec:
    f32
    f64

ctypedef fused logit:
    float16
    bfloat16
    float
    double

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

_DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}

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
    int dtype
    Py_ssize_t itemsize  # of the logits
    Py_ssize_t number  # bytes of a number that is computed with
    int label_code
    bint has_ignore
    uint64_t ignore
    Py_ssize_t power
    bint few  # classes
    Py_ssize_t line, block  # voxels of a line, of a block
    Py_ssize_t chunk, chunks  # voxels of a chunk, chunks of a sample

cdef struct Scratch:
    # One thread's memory. A number is a float, for float64 logits a double.
    char *staged  # (channels, block) logits, or their gradient; where classes are many it is the scores too
    char *scores  # (classes, block)
    char *scale  # (block,)
    char *label  # (TILE,): class, -1 where ignored, -2 where bad
    char *sums  # (3, classes) vectors
    char *factors  # (2, classes): of I and of P


# ---- vectors ---------------------------------------------------------------------------------------------------------

cdef inline void load(vec *v, const logit *p) noexcept nogil:
    if vec is f64:
        v[0] = load_doubles(p)
    elif logit is float16:
        v[0] = load_f16(p)
    elif logit is bfloat16:
        v[0] = load_bf16(p)
    else:
        v[0] = load_floats(p)


cdef inline void store(logit *p, vec v) noexcept nogil:
    if vec is f64:
        store_doubles(p, v)
    elif logit is float16:
        store_f16(p, v)
    elif logit is bfloat16:
        store_bf16(p, v)
    else:
        store_floats(p, v)


cdef inline int lanes(vec *v) noexcept nogil:
    return sizeof(vec) // sizeof(double) if vec is f64 else sizeof(vec) // sizeof(float)


cdef inline void spread(vec *v, const char *table, Py_ssize_t i) noexcept nogil:
    """The i-th number of a table in every lane."""
    if vec is f64:
        v[0] = spread_doubles((<const double *>table)[i])
    else:
        v[0] = spread_floats((<const float *>table)[i])


cdef inline vec maximum(vec a, vec b) noexcept nogil:
    """The larger; b if either is NaN."""
    if vec is f64:
        return max_doubles(a, b)
    else:
        return max_floats(a, b)


cdef inline vec minimum(vec a, vec b) noexcept nogil:
    """The smaller; b if either is NaN."""
    if vec is f64:
        return min_doubles(a, b)
    else:
        return min_floats(a, b)


cdef inline vec equal(vec a, vec b) noexcept nogil:
    if vec is f64:
        return equal_doubles(a, b)
    else:
        return equal_floats(a, b)


cdef inline vec less(vec a, vec b) noexcept nogil:
    if vec is f64:
        return less_doubles(a, b)
    else:
        return less_floats(a, b)


cdef inline vec where(vec mask, vec v) noexcept nogil:
    """v where the mask is set, else 0."""
    if vec is f64:
        return where_doubles(mask, v)
    else:
        return where_floats(mask, v)


cdef inline vec unless(vec mask, vec v) noexcept nogil:
    """0 where the mask is set, else v."""
    if vec is f64:
        return unless_doubles(mask, v)
    else:
        return unless_floats(mask, v)


cdef inline vec exponent(vec t) noexcept nogil:
    """The lowest bits of the significand as exponent bits."""
    if vec is f64:
        return exponent_doubles(t)
    else:
        return exponent_floats(t)


cdef inline vec tally(vec count, vec mask) noexcept nogil:
    """The count, an integer in a vector's bits, plus one where the mask is set."""
    if vec is f64:
        return tally_doubles(count, mask)
    else:
        return tally_floats(count, mask)


cdef inline vec larger_magnitude(vec a, vec b) noexcept nogil:
    """The larger of a, which is not negative, and |b|; NaN is larger than infinity."""
    if vec is f64:
        return larger_magnitude_doubles(a, b)
    else:
        return larger_magnitude_floats(a, b)


cdef inline bint any_above(vec a, double bound) noexcept nogil:
    """Whether a lane of a, none negative, is above the bound or NaN."""
    if vec is f64:
        return any_above_doubles(a, bound)
    else:
        return any_above_floats(a, <float>bound)


cdef inline void largest(vec *v) noexcept nogil:
    if vec is f64:
        v[0] = spread_doubles(1.7976931348623157e308)
    else:
        v[0] = spread_floats(<float>3.4028234663852886e38)


cdef inline void zero(vec *v) noexcept nogil:
    if vec is f64:
        v[0] = spread_doubles(0)
    else:
        v[0] = spread_floats(0)


cdef inline void lowest_exp(vec *v) noexcept nogil:
    """Just small enough for exp to be 0."""
    if vec is f64:
        v[0] = spread_doubles(-709.0895657128241)
    else:
        v[0] = spread_floats(<float>-88.02969)


cdef inline vec exp(vec x) noexcept nogil:
    """exp(x) within 1.5 ulp where it is a normal number; 0 just below. x from -88.02 (-709.09) to 88 (709)."""
    cdef vec n, r, y
    if vec is f64:
        y = x * 1.4426950408889634 + 6755399441056767.0
        n = y - 6755399441056767.0
        r = (x - n * 0.6931467056274414) - n * 4.7493250390316726e-07
        x = 2.51003854955103191e-8 * r + 2.76200884454097482e-7
        x = x * r + 2.75572684599970648e-6
        x = x * r + 2.48015212959543751e-5
        x = x * r + 1.98412698630536169e-4
        x = x * r + 1.38888889172137169e-3
        x = x * r + 8.33333333333006183e-3
        x = x * r + 4.16666666666241279e-2
        x = x * r + 0.166666666666666675
        x = x * r + 0.5
        x = (x * (r * r) + r) + 1.0
    else:
        y = x * <float>1.4426950408889634 + <float>12583039.0
        n = y - <float>12583039.0
        r = x - n * LN2
        if LN2_REST != 0:
            r = r - n * LN2_REST
        x = <float>0.008290297351777554 * r + <float>0.041898030787706375
        x = x * r + <float>0.1666763722896576
        x = x * r + <float>0.4999914765357971
        x = x * r + <float>0.9999997019767761
        x = x * r + <float>1.0
    return x * exponent(y)


cdef vec power(vec s, Py_ssize_t p) noexcept nogil:
    """s**p for p >= 1, by repeated squaring."""
    cdef vec y
    while p & 1 == 0:
        s = s * s
        p >>= 1
    y = s
    p >>= 1
    while p:
        s = s * s
        if p & 1:
            y = y * s
        p >>= 1
    return y


# ---- labels ----------------------------------------------------------------------------------------------------------

cdef Py_ssize_t load_label_row(
    const label_t *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, real *out, bint *ignored
) noexcept nogil:
    """Class indices of n labels, negative where they do not count. Returns how many were out of range."""
    cdef Py_ssize_t v
    cdef label_t k, ignore = <label_t>q.ignore
    cdef uint32_t low, classes = <uint32_t>min(q.classes, <Py_ssize_t>2147483647)
    cdef uint32_t ignore_low = <uint32_t>ignore, ignore_high = <uint32_t>(q.ignore >> 32)
    cdef uint32_t high
    cdef bint has_ignore = q.has_ignore
    cdef int32_t c, lowest = 0, bad = 0
    for v in range(n):
        if stride == sizeof(label_t):
            k = y[v]
        else:
            k = (<const label_t *>(<const char *>y + v * stride))[0]
        low = <uint32_t>k
        if label_t is int64_t or label_t is uint64_t:
            high = <uint32_t>(<uint64_t>k >> 32)
            c = <int32_t>low if (low < classes) & (high == 0) else -2
            c = -1 if has_ignore & (low == ignore_low) & (high == ignore_high) else c
        else:
            c = <int32_t>low if low < classes else -2
            c = -1 if has_ignore & (low == ignore_low) else c
        lowest = min(lowest, c)
        out[v] = c
    if lowest < 0:
        ignored[0] = True
        for v in range(n):
            bad += out[v] == -2
    return bad


cdef Py_ssize_t load_labels(
    const char *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, real *out, bint *ignored
) noexcept nogil:
    if q.label_code == 0:
        return load_label_row(<const uint8_t *>y, stride, n, q, out, ignored)
    if q.label_code == 1:
        return load_label_row(<const int8_t *>y, stride, n, q, out, ignored)
    if q.label_code == 2:
        return load_label_row(<const uint16_t *>y, stride, n, q, out, ignored)
    if q.label_code == 3:
        return load_label_row(<const int16_t *>y, stride, n, q, out, ignored)
    if q.label_code == 4:
        return load_label_row(<const uint32_t *>y, stride, n, q, out, ignored)
    if q.label_code == 5:
        return load_label_row(<const int32_t *>y, stride, n, q, out, ignored)
    if q.label_code == 6:
        return load_label_row(<const uint64_t *>y, stride, n, q, out, ignored)
    return load_label_row(<const int64_t *>y, stride, n, q, out, ignored)


cdef inline Py_ssize_t padded(Py_ssize_t n, Py_ssize_t multiple) noexcept nogil:
    return (n + multiple - 1) // multiple * multiple


cdef Py_ssize_t load_tile_labels(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, char *out, bint *ignored
) noexcept nogil:
    """The labels of n voxels, then ignored ones up to a whole line."""
    cdef const char *y = q.labels + sample * q.labels_n
    cdef Py_ssize_t stride = q.axes.labels[q.axes.count - 1]
    cdef Py_ssize_t v, run, done = 0, bad = 0
    cdef Place at
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        if q.number == sizeof(double):
            bad += load_labels(y + at.labels, stride, run, q, <double *>out + done, ignored)
        else:
            bad += load_labels(y + at.labels, stride, run, q, <float *>out + done, ignored)
        done += run
    for v in range(n, padded(n, q.line)):
        if q.number == sizeof(double):
            (<double *>out)[v] = -1
        else:
            (<float *>out)[v] = -1
    return bad


# ---- places ----------------------------------------------------------------------------------------------------------

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


cdef void gather_row(const logit *p, Py_ssize_t stride, Py_ssize_t n, real *to) noexcept nogil:
    """n logits, `stride` apart, as numbers side by side."""
    cdef Py_ssize_t v, m, k
    cdef uint16_t raw[64]
    cdef f32 numbers
    if logit is float or logit is double:
        if stride == 1:
            memcpy(to, p, n * sizeof(real))
        else:
            for v in range(n):
                to[v] = <real>p[v * stride]
    else:
        v = 0
        while v < n:
            m = min(n - v, <Py_ssize_t>lanes(&numbers))
            for k in range(m):
                raw[k] = <uint16_t>p[(v + k) * stride]
            load(&numbers, <const logit *>raw)
            memcpy(to + v, &numbers, m * sizeof(real))
            v += m


cdef void scatter_row(const real *row, Py_ssize_t n, logit *p, Py_ssize_t stride) noexcept nogil:
    """n numbers side by side, rounded, into the gradient, `stride` apart."""
    cdef Py_ssize_t v, m, k
    cdef uint16_t raw[64]
    cdef f32 numbers
    if logit is float or logit is double:
        if stride == 1:
            memcpy(p, row, n * sizeof(real))
        else:
            for v in range(n):
                p[v * stride] = <logit>row[v]
    else:
        v = 0
        while v < n:
            m = min(n - v, <Py_ssize_t>lanes(&numbers))
            memcpy(&numbers, row + v, m * sizeof(real))
            store(<logit *>raw, numbers)
            for k in range(m):
                p[(v + k) * stride] = <logit>raw[k]
            v += m


cdef void gather(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, const logit *kind, real *to
) noexcept nogil:
    """The logits of n voxels into (channels, block) numbers."""
    cdef Py_ssize_t stride = q.axes.logits[q.axes.count - 1] // <Py_ssize_t>sizeof(logit)
    cdef Py_ssize_t row = q.logits_c // <Py_ssize_t>sizeof(logit)
    cdef Py_ssize_t c, v, run, done = 0
    cdef const logit *x
    cdef Place at
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        x = <const logit *>(q.logits + sample * q.logits_n + at.logits)
        for c in range(q.channels):
            if stride == 1 and c + ROWS_AHEAD < q.channels:
                v = 0
                while v < run:
                    PREFETCH(x + ROWS_AHEAD * row + v)
                    v += CACHE_LINE // sizeof(logit)
            gather_row(x, stride, run, to + c * q.block + done)
            x += row
        done += run


cdef void scatter(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, const real *from_, logit *kind
) noexcept nogil:
    """(channels, block) numbers into the gradient of n voxels."""
    cdef Py_ssize_t stride = q.axes.grad[q.axes.count - 1] // <Py_ssize_t>sizeof(logit)
    cdef Py_ssize_t row = q.grad_c // <Py_ssize_t>sizeof(logit)
    cdef Py_ssize_t c, run, done = 0
    cdef logit *grad
    cdef Place at
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        grad = <logit *>(q.grad + sample * q.grad_n + at.grad)
        for c in range(q.channels):
            scatter_row(from_ + c * q.block + done, run, grad, stride)
            grad += row
        done += run


# ---- scores of one vector of voxels ----------------------------------------------------------------------------------

cdef inline vec score_any(
    const logit *x, Py_ssize_t row, Py_ssize_t channels, vec *e, Py_ssize_t e_row
) noexcept nogil:
    """exp(x - max x) of every class and their sum. A single channel is the second of two, the first being 0.

    Rows of logits are `row` apart, those of e `e_row`; x may be e. Infinities of one sign are as in the limit.
    """
    cdef vec top, total, v, nought, lowest, bound
    cdef Py_ssize_t c
    zero(&nought)
    largest(&bound)
    lowest_exp(&lowest)
    load(&top, x)
    if channels == 1:
        v = top
        top = maximum(nought, top)
        # inf - inf
        top = minimum(bound, top)
        e[0] = exp(maximum(lowest, nought - top))
        e[e_row] = exp(minimum(nought, maximum(lowest, v - top)))
        return e[0] + e[e_row]
    for c in range(1, channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    # With a finite reference +inf scores 1 and a voxel of nothing but -inf scores NaN.
    top = maximum(nought - bound, minimum(bound, top))
    total = nought
    for c in range(channels):
        load(&v, x)
        v = exp(minimum(nought, maximum(lowest, v - top)))
        e[0] = v
        total = total + v
        x += row
        e += e_row
    return total


cdef vec score_far(
    const logit *x, Py_ssize_t row, Py_ssize_t channels, vec *e, Py_ssize_t e_row
) noexcept nogil:
    """`score_any`, kept out of line for the rare voxels that need it."""
    return score_any(x, row, channels, e, e_row)


cdef inline void score_few(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    int classes,
) noexcept nogil:
    """As `score_many`, for a constant number of classes: relative to the first of them.

    That spares one exponential, and none waits for a maximum.
    """
    cdef vec first, total, v, farthest, nought
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i
    cdef const logit *at
    cdef int c
    zero(&nought)
    for i in range(lines * VECTORS):
        at = x
        first = nought
        if q.channels == classes:
            load(&first, at)
            at += row
        farthest = nought
        total = nought + 1
        e[i] = total
        for c in range(1, classes):
            load(&v, at)
            at += row
            v = v - first
            farthest = larger_magnitude(farthest, v)
            v = exp(v)
            e[c * e_row + i] = v
            total = total + v
        if any_above(farthest, FARTHEST):
            total = score_far(x, row, q.channels, e + i, e_row)
        scale[i] = unless(less(label[i], nought), (nought + 1) / total)
        x += lanes(scale)


cdef void score_many(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    """Scores of whole lines of voxels but for a factor: e, (classes, block), and the factor, (block,), 0 where the
    label is negative. x may be e.
    """
    cdef vec total, nought
    cdef Py_ssize_t i
    zero(&nought)
    for i in range(lines * VECTORS):
        total = score_any(x, row, q.channels, e + i, q.block // lanes(scale))
        scale[i] = unless(less(label[i], nought), (nought + 1) / total)
        x += lanes(scale)


# ---- lines of voxels -------------------------------------------------------------------------------------------------

cdef inline void sum_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, vec *sums, bint linear
) noexcept nogil:
    """Adds I, P and Y of scored lines to sums, (3, classes); `linear`, a constant, says that p is 1."""
    cdef vec intersection[VECTORS]
    cdef vec pred_sum[VECTORS]
    cdef vec target_sum, which, mask, s
    cdef Py_ssize_t c, i, at
    cdef int k
    zero(&which)
    for c in range(q.classes):
        for k in range(VECTORS):
            zero(&intersection[k])
            zero(&pred_sum[k])
        target_sum = sums[2 * q.classes + c]
        for i in range(lines):
            for k in range(VECTORS):
                at = i * VECTORS + k
                mask = equal(label[at], which)
                s = e[at] * scale[at]
                target_sum = tally(target_sum, mask)
                intersection[k] = intersection[k] + where(mask, s)
                pred_sum[k] = pred_sum[k] + (s if linear else power(s, q.power))
        for k in range(VECTORS):
            sums[c] = sums[c] + intersection[k]
            sums[q.classes + c] = sums[q.classes + c] + pred_sum[k]
        sums[2 * q.classes + c] = target_sum
        which = which + 1
        e += q.block // lanes(&s)


cdef inline void grad_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const char *factors,
    logit *grad, Py_ssize_t row, bint linear,
) noexcept nogil:
    """The gradient of scored lines, rows `row` apart; it may lie over e. `linear`, a constant, says that p is 1."""
    cdef vec dot[VECTORS]
    cdef vec s, slope, a, b, which
    cdef Py_ssize_t i, c, e_row = q.block // lanes(&s)
    cdef const vec *at
    cdef logit *to
    cdef int k
    for i in range(lines):
        for k in range(VECTORS):
            zero(&dot[k])
        zero(&which)
        at = e
        for c in range(q.classes):
            spread(&a, factors, c)
            spread(&b, factors, q.classes + c)
            for k in range(VECTORS):
                slope = b if linear else b * power(at[k] * scale[k], q.power - 1)
                dot[k] = dot[k] + at[k] * (where(equal(label[k], which), a) + slope)
            which = which + 1
            at += e_row
        for k in range(VECTORS):
            dot[k] = dot[k] * scale[k]
        zero(&which)
        at = e
        to = grad
        for c in range(q.classes):
            if c >= q.classes - q.channels:
                spread(&a, factors, c)
                spread(&b, factors, q.classes + c)
                for k in range(VECTORS):
                    s = at[k] * scale[k]
                    slope = b if linear else b * power(s, q.power - 1)
                    store(to + k * lanes(&s), s * (where(equal(label[k], which), a) + (slope - dot[k])))
                to += row
            which = which + 1
            at += e_row
        e += VECTORS
        label += VECTORS
        scale += VECTORS
        grad += VECTORS * lanes(&s)


cdef void run_lines(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row,
) noexcept nogil:
    """Adds the statistics of whole lines of voxels to t.sums, or writes their gradient."""
    cdef vec *scale = <vec *>t.scale
    if q.classes == 2:
        score_few(q, x, x_row, lines, label, e, scale, 2)
    elif q.classes == 3:
        score_few(q, x, x_row, lines, label, e, scale, 3)
    elif q.classes == 4:
        score_few(q, x, x_row, lines, label, e, scale, 4)
    elif q.classes == 5:
        score_few(q, x, x_row, lines, label, e, scale, 5)
    elif q.classes == 6:
        score_few(q, x, x_row, lines, label, e, scale, 6)
    elif q.classes == 7:
        score_few(q, x, x_row, lines, label, e, scale, 7)
    elif q.classes == 8:
        score_few(q, x, x_row, lines, label, e, scale, 8)
    else:
        score_many(q, x, x_row, lines, label, e, scale)
    if q.grad == NULL:
        if q.power == 1:
            sum_lines(q, lines, label, e, scale, <vec *>t.sums, True)
        else:
            sum_lines(q, lines, label, e, scale, <vec *>t.sums, False)
    elif q.power == 1:
        grad_lines(q, lines, label, e, scale, t.factors, grad, grad_row, True)
    else:
        grad_lines(q, lines, label, e, scale, t.factors, grad, grad_row, False)


cdef void run_staged(
    const Problem *q, const Scratch *t, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, bint ignored,
    const vec *label, logit *kind, real *staged, vec *e,
) noexcept nogil:
    """Any voxels: staged in scratch, where the ignored ones are cleared, and written from there."""
    cdef Py_ssize_t lines = padded(n, q.line) // q.line
    ignored = ignored or n % q.line
    gather(q, sample, first, n, kind, staged)
    if ignored:
        clear_ignored(q, lines, label, <vec *>staged)
    run_lines(q, t, staged, q.block, lines, label, e, staged, q.block)
    if q.grad != NULL:
        if ignored:
            clear_ignored(q, lines, label, <vec *>staged)
        scatter(q, sample, first, n, staged, kind)


cdef void clear_ignored(const Problem *q, Py_ssize_t lines, const vec *label, vec *rows) noexcept nogil:
    """Zeros in (channels, block) where the label is negative, whatever was there."""
    cdef Py_ssize_t c, v
    cdef vec nought
    zero(&nought)
    for c in range(q.channels):
        for v in range(lines * VECTORS):
            rows[v] = unless(less(label[v], nought), rows[v])
        rows += q.block // lanes(&nought)


# ---- one chunk -------------------------------------------------------------------------------------------------------

cdef void flush(const Problem *q, vec *sums, real *numbers, double *out) noexcept nogil:
    """Adds the lanes of a tile's sums to out, and clears them. `numbers` are the sums' lanes."""
    cdef Py_ssize_t i
    cdef int k, width = lanes(sums)
    for i in range(3 * q.classes):
        for k in range(width):
            if i < 2 * q.classes:
                out[i] += numbers[i * width + k]
            elif real is double:
                out[i] += (<int64_t *>numbers)[i * width + k]
            else:
                out[i] += (<int32_t *>numbers)[i * width + k]
        zero(&sums[i])


cdef Py_ssize_t run_chunk(
    const Problem *q, Py_ssize_t index, const Scratch *t, const double *cotangent, double *sums, logit *kind
) noexcept nogil:
    """Adds the statistics of one chunk to sums, (3, classes), or else writes its gradient for the cotangents,
    (3, samples, classes). Returns how many bad labels.
    """
    cdef Py_ssize_t sample = index // q.chunks
    cdef Py_ssize_t first = index % q.chunks * q.chunk
    cdef Py_ssize_t stop = min(first + q.chunk, q.voxels)
    cdef Py_ssize_t n, m, done, direct, last = q.axes.count - 1, bad = 0
    cdef bint ignored
    cdef Py_ssize_t x_row = q.logits_c // <Py_ssize_t>sizeof(logit)
    cdef Py_ssize_t grad_row = q.grad_c // <Py_ssize_t>sizeof(logit)
    cdef const logit *x
    cdef logit *grad
    cdef char *label
    cdef Place at
    if q.grad != NULL:
        load_factors(q, cotangent + sample * q.classes, t.factors)
    while first < stop:
        n = min(TILE, stop - first)
        at = locate(&q.axes, first)
        ignored = False
        bad += load_tile_labels(q, sample, first, n, t.label, &ignored)
        x = <const logit *>(q.logits + sample * q.logits_n + at.logits)
        grad = <logit *>(q.grad + sample * q.grad_n + at.grad)
        direct = 0
        if (
            q.few and not ignored and at.run >= n and q.axes.logits[last] == sizeof(logit)
            and (q.grad == NULL or q.axes.grad[last] == sizeof(logit))
        ):
            direct = n // q.line * q.line
        done = 0
        while done < n:
            label = t.label + done * q.number
            if done < direct:
                m = min(q.block, direct - done)
                if logit is double:
                    run_lines(
                        q, t, x + done, x_row, m // q.line, <f64 *>label, <f64 *>t.scores, grad + done, grad_row
                    )
                else:
                    run_lines(
                        q, t, x + done, x_row, m // q.line, <f32 *>label, <f32 *>t.scores, grad + done, grad_row
                    )
            else:
                m = min(q.block, n - done)
                if logit is double:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <f64 *>label, <logit *>NULL,
                        <double *>t.staged, <f64 *>t.scores,
                    )
                else:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <f32 *>label, <logit *>NULL,
                        <float *>t.staged, <f32 *>t.scores,
                    )
            done += m
        if q.grad == NULL:
            if logit is double:
                flush(q, <f64 *>t.sums, <double *>t.sums, sums)
            else:
                flush(q, <f32 *>t.sums, <float *>t.sums, sums)
        first += n
    return bad


cdef void load_factors(const Problem *q, const double *cotangent, char *factors) noexcept nogil:
    """The cotangents of I and p times those of P, as numbers."""
    cdef Py_ssize_t c
    cdef double of_intersection, of_pred_sum
    for c in range(q.classes):
        of_intersection = cotangent[c]
        of_pred_sum = q.power * cotangent[q.samples * q.classes + c]
        if q.number == sizeof(double):
            (<double *>factors)[c] = of_intersection
            (<double *>factors)[q.classes + c] = of_pred_sum
        else:
            (<float *>factors)[c] = <float>of_intersection
            (<float *>factors)[q.classes + c] = <float>of_pred_sum


# ---- the whole problem -----------------------------------------------------------------------------------------------

cdef inline Py_ssize_t cache_lines(Py_ssize_t size) noexcept nogil:
    """Bytes, or an address, rounded up to whole cache lines, so that threads share none."""
    return (size + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef class Workspace:
    """One Scratch per thread; raises MemoryError before the parallel region, where nothing could."""

    cdef char *memory
    cdef Scratch *of_thread

    def __cinit__(self):
        self.memory = NULL
        self.of_thread = NULL

    def __dealloc__(self):
        free(self.memory)
        free(self.of_thread)

    cdef int allocate(self, const Problem *q, Py_ssize_t threads) except -1:
        cdef Py_ssize_t scores = cache_lines(q.classes * q.block * q.number)
        cdef Py_ssize_t staged = scores if q.few else 0
        cdef Py_ssize_t scale = cache_lines(q.block * q.number)
        cdef Py_ssize_t label = cache_lines(TILE * q.number)
        cdef Py_ssize_t sums = cache_lines(3 * q.classes * sizeof(f32))
        cdef Py_ssize_t factors = cache_lines(2 * q.classes * q.number)
        cdef Py_ssize_t size = staged + scores + scale + label + sums + factors
        cdef Py_ssize_t i
        cdef char *at
        self.memory = <char *>malloc(threads * size + CACHE_LINE)
        self.of_thread = <Scratch *>malloc(threads * sizeof(Scratch))
        if self.memory == NULL or self.of_thread == NULL:
            raise MemoryError
        at = <char *>cache_lines(<uintptr_t>self.memory)
        for i in range(threads):
            self.of_thread[i].staged = at
            self.of_thread[i].scores = at + staged
            self.of_thread[i].scale = at + staged + scores
            self.of_thread[i].label = at + staged + scores + scale
            self.of_thread[i].sums = at + staged + scores + scale + label
            self.of_thread[i].factors = at + staged + scores + scale + label + sums
            memset(self.of_thread[i].sums, 0, sums)
            at += size
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
    q.dtype = _DTYPES[logits.dtype]
    q.itemsize = logits.itemsize
    q.number = max(4, logits.itemsize)
    q.logits = <const char *><uintptr_t>logits.address
    q.labels = <const char *><uintptr_t>labels.address
    q.grad = NULL if grad is None else <char *><uintptr_t>grad.address
    q.samples, q.channels = logits.shape[:2]
    q.classes = q.channels + (spec.activation == "sigmoid")  # a single channel has a background too
    q.logits_n, q.logits_c = logits.strides[:2]
    q.labels_n = labels.strides[0]
    grad = logits if grad is None else grad
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

    q.few = q.classes <= MAX_FEW
    q.line = VECTORS * sizeof(f32) // q.number
    q.block = max(64, min(TILE, BLOCK_SCORES // q.classes)) // q.line * q.line
    q.chunk = max(CHUNK_SCORES // q.classes, (q.voxels + MAX_CHUNKS - 1) // MAX_CHUNKS, TILE)
    q.chunk = padded(q.chunk, TILE)
    q.chunks = (q.voxels + q.chunk - 1) // q.chunk
    return 0


cdef int team(Py_ssize_t chunks, threads) except -1:
    return max(1, min(chunks, threads)) if DICE_OPENMP else 1


def statistics(logits, labels, sums, spec, threads):
    """Fills sums, (3, N, C) contiguous float64, with I, P and Y. Returns how many labels were out of range."""
    cdef Problem q
    describe(&q, logits, labels, None, spec)
    cdef Py_ssize_t total = q.samples * q.chunks, width = 3 * q.classes
    cdef Py_ssize_t i, j, k, n, c, bad = 0
    cdef int workers = team(total, threads)
    cdef double *out = <double *><uintptr_t>sums.address
    cdef double part
    cdef Scratch *t
    cdef Workspace workspace = Workspace()
    workspace.allocate(&q, workers)
    cdef double *partial = <double *>calloc(max(1, total * width), sizeof(double))
    if partial == NULL:
        raise MemoryError
    with nogil:
        for i in prange(total, num_threads=workers, schedule="static"):
            t = &workspace.of_thread[threadid()]
            if q.dtype == 0:
                bad += run_chunk(&q, i, t, NULL, partial + i * width, <float16 *>NULL)
            elif q.dtype == 1:
                bad += run_chunk(&q, i, t, NULL, partial + i * width, <bfloat16 *>NULL)
            elif q.dtype == 2:
                bad += run_chunk(&q, i, t, NULL, partial + i * width, <float *>NULL)
            else:
                bad += run_chunk(&q, i, t, NULL, partial + i * width, <double *>NULL)
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
    cdef Scratch *t
    cdef Workspace workspace = Workspace()
    workspace.allocate(&q, workers)
    with nogil:
        for i in prange(total, num_threads=workers, schedule="static"):
            t = &workspace.of_thread[threadid()]
            if q.dtype == 0:
                bad += run_chunk(&q, i, t, upstream, NULL, <float16 *>NULL)
            elif q.dtype == 1:
                bad += run_chunk(&q, i, t, upstream, NULL, <bfloat16 *>NULL)
            elif q.dtype == 2:
                bad += run_chunk(&q, i, t, upstream, NULL, <float *>NULL)
            else:
                bad += run_chunk(&q, i, t, upstream, NULL, <double *>NULL)
    return bad


def exponential(x, out):
    """Fills out with exp(x), float32 or float64 side by side: the exponential of the kernels, for their tests."""
    cdef Py_ssize_t i = 0, m, n = x.shape[0]
    cdef bint double_ = x.dtype == "float64"
    cdef char *numbers = <char *><uintptr_t>x.address
    cdef char *to = <char *><uintptr_t>out.address
    cdef double wide[64]
    cdef float narrow[64]
    cdef f64 v
    cdef f32 w
    while i < n:
        if double_:
            m = min(n - i, <Py_ssize_t>lanes(&v))
            memcpy(wide, numbers + i * sizeof(double), m * sizeof(double))
            load(&v, <const double *>wide)
            store(<double *>wide, exp(v))
            memcpy(to + i * sizeof(double), wide, m * sizeof(double))
        else:
            m = min(n - i, <Py_ssize_t>lanes(&w))
            memcpy(narrow, numbers + i * sizeof(float), m * sizeof(float))
            load(&w, <const float *>narrow)
            store(<float *>narrow, exp(w))
            memcpy(to + i * sizeof(float), narrow, m * sizeof(float))
        i += m


def unsupported(call):
    """Reasons why these kernels do not take the call; none means they do."""
    reasons = []
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
