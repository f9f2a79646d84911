# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""Dice statistics and their gradient on the CPU.

Design
------
1. Summed, per sample and class over the counted voxels: I = sum s_c [y=c], P = sum s_c^p, Y = sum [y=c] and, if it is
   asked for, H = sum [y=c] (1 - s_c)^gamma (-log s_c) with s = softmax(x); one channel scores two classes,
   (1 - sigmoid(x), sigmoid(x)). Other scores, targets and sums have a loop of their own, in `_general.pxi`. The
   gradient is the vector-Jacobian product of the sums.
2. Precision: voxel arithmetic in float32 (float64 logits: in float64), the sums of one tile, at most 1024 voxels, too;
   all else in float64. 16-bit logits are converted as they are loaded, their gradient is rounded as it is stored.
3. A chunk is a fixed run of a sample's voxels, its length a function of shape alone; a thread owns whole chunks.
4. Chunks are added in order after the parallel loop: the same bits for any number of threads.
5. A tile is scored in blocks that stay in the first cache levels, a cache line of voxels at a time: the exponentials
   of all classes go to scratch, from where they are summed class by class, or become the gradient voxel by voxel.
6. Up to eight classes have a loop each, unrolled by the compiler; the rest share one. Two, the commonest, stay in
   registers from load to sum or store.
7. Any strides: voxels are visited along the logits' strides, axes merged where memory allows. Where they lie side by
   side, logits are read and gradients written in place, else through scratch, in their own type.
8. Voxels are read whole before their gradient is written, so the gradient may overwrite the logits.
9. Ignored voxels are cleared in scratch, never multiplied by zero: their NaN and infinities cannot leak.
10. Never allocated: anything of image size. Scratch is one block per thread, partial sums are a number per sum, class
    and chunk.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport (
    int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t,
)
from libc.stdlib cimport calloc, free, llabs, malloc
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

    /* Whether the first and the last of these bytes have pages yet; where that cannot be known, no. */
    #if defined(__linux__)
    #include <sys/mman.h>
    #include <unistd.h>
    static int is_mapped(const void *memory, size_t size) {
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)memory, last = first + size - 1;
        unsigned char a, b;
        return size > 0 && mincore((void *)(first / page * page), 1, &a) == 0 &&
               mincore((void *)(last / page * page), 1, &b) == 0 && (a & b & 1);
    }
    #else
    static int is_mapped(const void *memory, size_t size) { return (void)memory, (void)size, 0; }
    #endif

    /* Scores below it may come of exponentials that are not as exact as a number. */
    #define FAINT 1e-30

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
    bint is_mapped(const void *, size_t) noexcept
    const char *openmp_library() noexcept
    const double FAINT
    const char *DICE_LEVEL
    int DICE_OPENMP

include "_vectors.pxi"

cdef enum:
    MAX_AXES = 64
    MAX_CLASSES = 1 << 24  # a float32 tells apart
    TILE = 1024  # most voxels that are summed in the logits' arithmetic
    FARTHEST = 32  # of a voxel's logits from its first: half an ulp of it is how wrong a score may be, 2e-6 of it
    BLOCK_SCORES = 4096  # scores of a block in scratch, so that they stay in the first cache level
    MANY_VOXELS = 64  # of many classes are read at a time,
    MANY_SCORES = 16384  # as long as their scores stay in the second
    MAX_POWER = 16  # of a whole gamma that is multiplied out
    AHEAD = 256  # bytes: how early rows are asked for that are more than the processor foresees by itself
    CHUNK_SCORES = 65536
    THREAD_SCORES = 32768  # for less no thread is woken
    CHUNK_STEP = 256  # voxels
    MAX_CHUNKS = 256
    CACHE_LINE = 64

ctypedef fused label_t:  # a label's bits
    uint8_t
    uint16_t
    uint32_t
    uint64_t

ctypedef fused target_t:  # of how much of a class a voxel is
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

# label dtype -> (smallest, largest)
_LABELS = {"bool": (0, 1)}
for _bits in (8, 16, 32, 64):
    _LABELS[f"int{_bits}"] = (-(2 ** (_bits - 1)), 2 ** (_bits - 1) - 1)
    _LABELS[f"uint{_bits}"] = (0, 2**_bits - 1)

_TARGETS = {
    name: code
    for code, name in enumerate(
        "uint8 int8 uint16 int16 uint32 int32 uint64 int64 float32 float64 float16 bfloat16".split()
    )
} | {"bool": 0}
_ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "none": 2, "argmax": 3, "threshold": 4}

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
    Py_ssize_t logits_n, logits_c, labels_n, labels_c, grad_n, grad_c  # byte strides of sample and channel
    Py_ssize_t samples, channels, classes, voxels
    Axes axes
    int dtype
    Py_ssize_t itemsize  # of the logits
    Py_ssize_t number  # bytes of a number that is computed with
    int label_size  # bytes
    uint32_t label_limit  # bits below it are a class
    bint has_ignore
    uint64_t ignore  # bits
    Py_ssize_t power
    Py_ssize_t sums  # of a class: I, P, Y and what else is asked for,
    bint entropy  # H if this says so,
    bint focal  # with a gamma above 0
    double gamma
    Py_ssize_t whole_gamma  # or 0
    bint plain  # nothing of what follows
    int activation  # softmax, sigmoid, none, argmax, threshold
    bint dense  # labels are how much of each class,
    int target_dtype
    double ignore_target
    bint smoothing, binary  # sum L; B+ and B-
    double binary_gamma
    Py_ssize_t whole_binary_gamma
    Py_ssize_t row_l, row_b, row_v  # of the sums, if there are such
    bint past_caches  # the gradient is stored so: it will not be read soon, and no page is made by the way
    Py_ssize_t line, block  # voxels of a line, of a block
    Py_ssize_t chunk, chunks  # voxels of a chunk, chunks of a sample

cdef struct Scratch:
    # One thread's memory. A number is a float, for float64 logits a double.
    char *staged  # (channels, block) logits, or their gradient, as they are stored
    char *scores  # (classes, block)
    char *scale  # (block,)
    char *entropy  # (block,): what a voxel adds to H, or what a focal loss's cotangent of H is multiplied by
    char *label  # (TILE,): class, -1 where ignored, -2 where bad
    char *targets  # (classes, block): how much of each class, negative where it does not count
    char *pivot  # (2, block): of the voxels' largest class, -log s and its logit
    char *sums  # (K, classes) vectors
    char *factors  # (6, classes): of I, P, H, L, B+ and B-


include "_labels.pxi"


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


cdef inline void prefetch(const char *p, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """Asks for n elements, a row of which the processor cannot foresee."""
    cdef const char *stop = p + n * stride
    while p < stop:
        PREFETCH(p)
        p += max(stride, CACHE_LINE)


cdef inline void copy_words(
    const word *source, Py_ssize_t source_step, word *to, Py_ssize_t step, Py_ssize_t n
) noexcept nogil:
    for _ in range(n):
        to[0] = source[0]
        source += source_step
        to += step


cdef void transpose(
    const word *source, Py_ssize_t source_row, word *to, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t columns
) noexcept nogil:
    """Four by four, the last ones overlapping, so there must be four: to[j, i] = source[i, j]."""
    cdef Py_ssize_t i, j
    for i in range(0, rows, 4):
        i = min(i, rows - 4)
        for j in range(0, columns, 4):
            j = min(j, columns - 4)
            transpose_four(source + i * source_row + j, source_row, to + j * row + i, row)


cdef void copy_block(
    const word *source, Py_ssize_t source_step, Py_ssize_t source_row,
    word *to, Py_ssize_t step, Py_ssize_t row, Py_ssize_t n, Py_ssize_t channels,
) noexcept nogil:
    """to[c, v] = source[c, v]: n voxels a step apart, channels a row apart."""
    if source_row == 1 and step == 1 and n >= 4 and channels >= 4:
        transpose(source, source_step, to, row, n, channels)
    elif source_step == 1 and row == 1 and n >= 4 and channels >= 4:
        transpose(source, source_row, to, step, channels, n)
    else:
        for _ in range(channels):
            if source_step == 1 and step == 1:
                memcpy(to, source, n * sizeof(word))
            elif source_step == 2 and step == 1:  # constants make vectors of the loop
                copy_words(source, 2, to, 1, n)
            else:
                copy_words(source, source_step, to, step, n)
            source += source_row
            to += row


cdef void gather(const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, word *staged) noexcept nogil:
    """The logits of n voxels into (channels, block)."""
    cdef Py_ssize_t stride = q.axes.logits[q.axes.count - 1]
    cdef Py_ssize_t c, run, done = 0
    cdef const char *x
    cdef Place at
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        x = q.logits + sample * q.logits_n + at.logits
        if q.axes.count > 1:
            for c in range(q.channels):
                prefetch(x + c * q.logits_c + q.axes.logits[q.axes.count - 2], stride, run)
        copy_block(
            <const word *>x, stride // <Py_ssize_t>sizeof(word), q.logits_c // <Py_ssize_t>sizeof(word),
            staged + done, 1, q.block, run, q.channels,
        )
        done += run


cdef void scatter(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, const word *staged
) noexcept nogil:
    """(channels, block) into the gradient of n voxels."""
    cdef Py_ssize_t run, done = 0
    cdef Place at
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        copy_block(
            staged + done, 1, q.block, <word *>(q.grad + sample * q.grad_n + at.grad),
            q.axes.grad[q.axes.count - 1] // <Py_ssize_t>sizeof(word), q.grad_c // <Py_ssize_t>sizeof(word),
            run, q.channels,
        )
        done += run


cdef void clear_ignored(const Problem *q, Py_ssize_t n, const real *label, word *staged) noexcept nogil:
    """Zeros in (channels, block) where the label is negative, whatever was there."""
    cdef Py_ssize_t v
    for _ in range(q.channels):
        for v in range(n):
            staged[v] = staged[v] if label[v] >= 0 else 0
        staged += q.block


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
        top = minimum(bound, maximum(nought, top))
        e[0] = exp(maximum(lowest, nought - top))
        e[e_row] = exp(minimum(nought, maximum(lowest, v - top)))
        return e[0] + e[e_row]
    for c in range(1, channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    # With a finite reference +inf scores 1 and a voxel of nothing but -inf scores NaN.
    top = maximum(nought - bound, minimum(bound, top))
    total = nought
    for _ in range(channels):
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
            farthest = maximum(farthest, magnitude(v))
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
    label is negative.
    """
    cdef vec first[VECTORS]
    cdef vec total[VECTORS]
    cdef vec farthest[VECTORS]
    cdef vec v, nought
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef const logit *at
    cdef vec *to
    cdef int k
    zero(&nought)
    for _ in range(lines):
        at = x
        to = e
        for k in range(VECTORS):
            load(&first[k], at + k * lanes(scale))
            farthest[k] = total[k] = nought
        for _ in range(q.classes):
            PREFETCH(<const char *>at + AHEAD)
            for k in range(VECTORS):
                load(&v, at + k * lanes(scale))
                v = v - first[k]
                farthest[k] = maximum(farthest[k], magnitude(v))
                v = exp(v)
                to[k] = v
                total[k] = total[k] + v
            at += row
            to += e_row
        for k in range(VECTORS):
            if any_above(farthest[k], FARTHEST):
                total[k] = score_far(x + k * lanes(scale), row, q.channels, e + k, e_row)
            scale[k] = unless(less(label[k], nought), (nought + 1) / total[k])
        x += VECTORS * lanes(scale)
        e += VECTORS
        label += VECTORS
        scale += VECTORS


# ---- cross-entropy ---------------------------------------------------------------------------------------------------

cdef vec entropy_far(const logit *x, Py_ssize_t row, Py_ssize_t channels, vec label) noexcept nogil:
    """`entropy_of` from the logits, however far apart they are."""
    cdef vec top, bound, nought, lowest, which, own, total, v, endless
    cdef Py_ssize_t c
    zero(&nought)
    largest(&bound)
    lowest_exp(&lowest)
    load(&top, x)
    for c in range(channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    if channels == 1:
        top = maximum(nought, top)
    endless = less(bound, top)
    top = maximum(nought - bound, minimum(bound, top))
    own = total = which = nought
    if channels == 1:
        total = exp(maximum(lowest, nought - top))
        which = which + 1
    for c in range(channels):
        load(&v, x + c * row)
        own = own + where(equal(label, which), v)
        total = total + exp(minimum(nought, maximum(lowest, v - top)))
        which = which + 1
    # A class beside one of +inf has -log s = inf.
    v = where(endless, less(own, bound + bound))
    v = minimum(nought, own - top) - where(v, bound + bound)
    return log(total, nought + 1 - total) + total * 0 - v  # NaN of NaN


cdef inline vec entropy_of(
    vec own, vec rest, vec label, const logit *x, Py_ssize_t row, Py_ssize_t channels
) noexcept nogil:
    """-log of `own`, the scores of the voxels' own classes, the others' being `rest`; of logits `row` apart. Anything
    where there is none.
    """
    cdef vec nought
    zero(&nought)
    own = own + where(less(label, nought), nought + 1)
    if any_above(nought - own, -FAINT):
        return entropy_far(x, row, channels, label)
    return nought - log(own, rest)


cdef inline vec focus(vec rest, double gamma, Py_ssize_t whole) noexcept nogil:
    """rest^gamma, for rest from 0 to 1; `whole` is gamma if that is a small whole number above 0."""
    cdef vec nought, lowest
    if whole == 2:
        return rest * rest
    if whole:
        return power(rest, whole)
    zero(&nought)
    if gamma == 0:
        return nought + 1
    lowest_exp(&lowest)
    return exp(minimum(nought, maximum(lowest, number(&lowest, gamma) * log(rest, nought + 1 - rest))))


cdef inline vec focus_slope(vec entropy, vec score, vec rest, double gamma, Py_ssize_t whole) noexcept nogil:
    """The derivative of rest^gamma (-log s) where that of -log s is 1: rest^gamma (1 + gamma s (-log s) / rest)."""
    cdef vec bound
    if gamma == 0:
        return focus(rest, gamma, whole)
    largest(&bound)
    entropy = minimum(bound, entropy) * score / maximum(number(&rest, FAINT), rest)
    return (number(&rest, gamma) * entropy + 1) * focus(rest, gamma, whole)


cdef void entropy_lines(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, vec *entropy,
) noexcept nogil:
    """What each voxel of scored lines adds to H, or, for the gradient, what its derivative for the logits is besides
    s - [y=c].
    """
    cdef vec own, rest, which, mask, nought, h
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    zero(&nought)
    for i in range(lines * VECTORS):
        own = rest = which = nought
        for c in range(q.classes):
            mask = equal(label[i], which)
            own = own + where(mask, e[c * e_row + i])
            rest = rest + unless(mask, e[c * e_row + i])
            which = which + 1
        own = own * scale[i]
        rest = rest * scale[i]
        h = entropy_of(own, rest, label[i], x + i * lanes(scale), row, q.channels)
        if q.focal:
            if q.grad == NULL:
                h = h * focus(rest, q.gamma, q.whole_gamma)
            else:
                h = focus_slope(h, own, rest, q.gamma, q.whole_gamma)
        entropy[i] = h


# ---- lines of voxels -------------------------------------------------------------------------------------------------

cdef inline void sum_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const vec *entropy, vec *sums,
    bint linear, bint entropies,
) noexcept nogil:
    """Adds I, P, Y and H of scored lines to sums, (3 or 4, classes). Constants: `linear` says that p is 1, `entropies`
    whether there is an H.
    """
    cdef vec intersection[VECTORS]
    cdef vec pred_sum[VECTORS]
    cdef vec cross_entropy[VECTORS]
    cdef vec target_sum, which, mask, s
    cdef Py_ssize_t c, i, at
    cdef int k
    zero(&which)
    for c in range(q.classes):
        for k in range(VECTORS):
            zero(&intersection[k])
            zero(&pred_sum[k])
            zero(&cross_entropy[k])
        target_sum = sums[2 * q.classes + c]
        for i in range(lines):
            for k in range(VECTORS):
                at = i * VECTORS + k
                mask = equal(label[at], which)
                s = e[at] * scale[at]
                target_sum = tally(target_sum, mask)
                intersection[k] = intersection[k] + where(mask, s)
                pred_sum[k] = pred_sum[k] + (s if linear else power(s, q.power))
                if entropies:
                    cross_entropy[k] = cross_entropy[k] + where(mask, entropy[at])
        for k in range(VECTORS):
            sums[c] = sums[c] + intersection[k]
            sums[q.classes + c] = sums[q.classes + c] + pred_sum[k]
            if entropies:
                sums[3 * q.classes + c] = sums[3 * q.classes + c] + cross_entropy[k]
        sums[2 * q.classes + c] = target_sum
        which = which + 1
        e += q.block // lanes(&s)


cdef inline void grad_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const vec *entropy,
    const char *factors, logit *grad, Py_ssize_t row, bint linear, bint entropies, bint past_caches,
) noexcept nogil:
    """The gradient of scored lines, rows `row` apart; it may lie over e. Constants: `linear` says that p is 1,
    `entropies` whether there is an H, `past_caches` how to store.
    """
    cdef vec dot[VECTORS]
    cdef vec of_own[VECTORS]  # the factor of s - [y=c]
    cdef vec s, slope, mask, a, b, h, which
    cdef Py_ssize_t c, e_row = q.block // lanes(&s)
    cdef const vec *at
    cdef logit *to
    cdef int k
    for _ in range(lines):
        for k in range(VECTORS):
            zero(&dot[k])
            zero(&of_own[k])
        zero(&which)
        at = e
        for c in range(q.classes):
            spread(&a, factors, c)
            spread(&b, factors, q.classes + c)
            if entropies:
                spread(&h, factors, 2 * q.classes + c)
            for k in range(VECTORS):
                mask = equal(label[k], which)
                slope = b if linear else b * power(at[k] * scale[k], q.power - 1)
                dot[k] = dot[k] + at[k] * (where(mask, a) + slope)
                if entropies:
                    of_own[k] = of_own[k] + where(mask, h)
            which = which + 1
            at += e_row
        for k in range(VECTORS):
            dot[k] = dot[k] * scale[k]
            if entropies:
                if q.focal:
                    of_own[k] = of_own[k] * entropy[k]
                dot[k] = dot[k] - of_own[k]
        zero(&which)
        at = e
        to = grad
        for c in range(q.classes):
            if c >= q.classes - q.channels:
                spread(&a, factors, c)
                spread(&b, factors, q.classes + c)
                for k in range(VECTORS):
                    s = at[k] * scale[k]
                    mask = equal(label[k], which)
                    slope = b if linear else b * power(s, q.power - 1)
                    s = s * (where(mask, a) + (slope - dot[k]))
                    if entropies:
                        s = s - where(mask, of_own[k])
                    if past_caches:
                        stream(to + k * lanes(&s), s)
                    else:
                        store(to + k * lanes(&s), s)
                to += row
            which = which + 1
            at += e_row
        e += VECTORS
        label += VECTORS
        scale += VECTORS
        entropy += VECTORS
        grad += VECTORS * lanes(&s)


cdef inline void two_classes(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    logit *grad, Py_ssize_t row, int channels, bint sums, bint entropies, bint past_caches,
) noexcept nogil:
    """All of the above in registers, for two classes, p = 1 and gamma = 0. The last four are constants.

    With t_c = a_c [y=c] + b_c the gradient of class 1 is s_0 s_1 (t_1 - t_0) + h_0 [y=0] s_1 - h_1 [y=1] s_0, that of
    class 0 its negative.
    """
    cdef vec s[2]
    cdef vec a[2]
    cdef vec b[2]
    cdef vec h[2]
    cdef vec mask[2]
    cdef vec intersection[2]
    cdef vec pred_sum[2]
    cdef vec target_sum[2]
    cdef vec cross_entropy[2]
    cdef vec nought, first, v, total, scale
    cdef vec *out = <vec *>t.sums
    cdef Py_ssize_t i
    cdef int c
    zero(&nought)
    for c in range(2):
        intersection[c] = pred_sum[c] = cross_entropy[c] = nought
        target_sum[c] = out[4 + c]
        spread(&a[c], t.factors, c)
        spread(&b[c], t.factors, 2 + c)
        if entropies:
            spread(&h[c], t.factors, 4 + c)
    for i in range(lines * VECTORS):
        first = nought
        if channels == 2:
            load(&first, x)
        load(&v, x + (channels - 1) * x_row)
        v = v - first
        s[0] = nought + 1
        s[1] = exp(v)
        total = s[0] + s[1]
        if any_above(magnitude(v), FARTHEST):
            total = score_far(x, x_row, channels, s, 1)
        scale = unless(less(label[i], nought), (nought + 1) / total)
        v = b[1] - b[0]
        for c in range(2):
            s[c] = s[c] * scale
            mask[c] = equal(label[i], nought + 1 if c else nought)
            if sums:
                intersection[c] = intersection[c] + where(mask[c], s[c])
                pred_sum[c] = pred_sum[c] + s[c]
                target_sum[c] = tally(target_sum[c], mask[c])
            elif c == 0:
                v = v - where(mask[c], a[c])
            else:
                v = v + where(mask[c], a[c])
        if sums and entropies:
            v = entropy_of(
                where(mask[0], s[0]) + where(mask[1], s[1]), unless(mask[0], s[0]) + unless(mask[1], s[1]), label[i],
                x, x_row, channels,
            )
            for c in range(2):
                cross_entropy[c] = cross_entropy[c] + where(mask[c], v)
        if not sums:
            v = v * (s[0] * s[1])
            if entropies:
                v = v + (where(mask[0], h[0] * s[1]) - where(mask[1], h[1] * s[0]))
            if channels == 2:
                if past_caches:
                    stream(grad, nought - v)
                else:
                    store(grad, nought - v)
            if past_caches:
                stream(grad + (channels - 1) * row, v)
            else:
                store(grad + (channels - 1) * row, v)
            grad += lanes(&v)
        x += lanes(&v)
    if sums:
        for c in range(2):
            out[c] = out[c] + intersection[c]
            out[2 + c] = out[2 + c] + pred_sum[c]
            out[4 + c] = target_sum[c]
            if entropies:
                out[6 + c] = out[6 + c] + cross_entropy[c]


cdef inline void run_two_classes(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    logit *grad, Py_ssize_t grad_row, int channels, bint past_caches,
) noexcept nogil:
    if q.grad == NULL:
        if q.entropy:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, True, True, False)
        else:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, True, False, False)
    elif q.entropy:
        if past_caches:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, True, True)
        else:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, True, False)
    elif past_caches:
        two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, False, True)
    else:
        two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, False, False)


include "_general.pxi"


# ---- any lines -------------------------------------------------------------------------------------------------------

cdef void run_lines(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row, bint past_caches,
) noexcept nogil:
    """Adds the statistics of whole lines of voxels to t.sums, or writes their gradient."""
    cdef vec *scale = <vec *>t.scale
    cdef vec *entropy = <vec *>t.entropy
    if not q.plain:
        run_more(q, t, x, x_row, lines, label, e, grad, grad_row)
        return
    if q.classes == 2 and q.power == 1 and not q.focal:
        if q.channels == 1:
            run_two_classes(q, t, x, x_row, lines, label, grad, grad_row, 1, past_caches)
        else:
            run_two_classes(q, t, x, x_row, lines, label, grad, grad_row, 2, past_caches)
        return
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
    if q.entropy and (q.grad == NULL or q.focal):
        entropy_lines(q, x, x_row, lines, label, e, scale, entropy)
    if q.grad == NULL:
        if q.entropy:
            if q.power == 1:
                sum_lines(q, lines, label, e, scale, entropy, <vec *>t.sums, True, True)
            else:
                sum_lines(q, lines, label, e, scale, entropy, <vec *>t.sums, False, True)
        elif q.power == 1:
            sum_lines(q, lines, label, e, scale, entropy, <vec *>t.sums, True, False)
        else:
            sum_lines(q, lines, label, e, scale, entropy, <vec *>t.sums, False, False)
    elif q.entropy:
        if q.power != 1:
            grad_lines(q, lines, label, e, scale, entropy, t.factors, grad, grad_row, False, True, False)
        elif past_caches:
            grad_lines(q, lines, label, e, scale, entropy, t.factors, grad, grad_row, True, True, True)
        else:
            grad_lines(q, lines, label, e, scale, entropy, t.factors, grad, grad_row, True, True, False)
    elif q.power != 1:
        grad_lines(q, lines, label, e, scale, entropy, t.factors, grad, grad_row, False, False, False)
    elif past_caches:
        grad_lines(q, lines, label, e, scale, entropy, t.factors, grad, grad_row, True, False, True)
    else:
        grad_lines(q, lines, label, e, scale, entropy, t.factors, grad, grad_row, True, False, False)


cdef void run_staged(
    const Problem *q, const Scratch *t, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, bint ignored,
    const real *label, word *words, logit *staged, vec *e,
) noexcept nogil:
    """Any voxels: staged in scratch, where the ignored ones are cleared, and written from there.

    `words` are what is staged, as bits.
    """
    cdef Py_ssize_t whole = padded(n, q.line)
    ignored = ignored or n < whole
    gather(q, sample, first, n, words)
    if ignored:
        clear_ignored(q, whole, label, words)
    run_lines(q, t, staged, q.block, whole // q.line, <const vec *>label, e, staged, q.block, False)
    if q.grad != NULL:
        if ignored:
            clear_ignored(q, whole, label, words)
        scatter(q, sample, first, n, words)


# ---- one chunk -------------------------------------------------------------------------------------------------------

cdef void flush(const Problem *q, vec *sums, real *numbers, double *out) noexcept nogil:
    """Adds the lanes of a tile's sums to out, and clears them. `numbers` are the sums' lanes."""
    cdef Py_ssize_t i
    cdef int k, width = lanes(sums)
    for i in range(q.sums * q.classes):
        for k in range(width):
            if not (q.plain and 2 * q.classes <= i < 3 * q.classes):  # the fast paths count in integers
                out[i] += numbers[i * width + k]
            elif real is double:
                out[i] += (<int64_t *>numbers)[i * width + k]
            else:
                out[i] += (<int32_t *>numbers)[i * width + k]
        zero(&sums[i])


cdef Py_ssize_t run_chunk(
    const Problem *q, Py_ssize_t index, const Scratch *t, const double *cotangent, double *sums, logit *kind
) noexcept nogil:
    """Adds the statistics of one chunk to its sums, or writes its gradient for the cotangents, (K, samples, classes).

    `kind` is the logits' type. Returns how many bad labels.
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
    if q.grad == NULL:
        sums += index * q.sums * q.classes
    else:
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
            not ignored and at.run >= n and q.axes.logits[last] == sizeof(logit)
            and (q.grad == NULL or q.axes.grad[last] == sizeof(logit))
        ):
            direct = n // q.line * q.line
        done = 0
        while done < n:
            label = t.label + done * q.number
            m = min(q.block, (direct if done < direct else n) - done)
            if q.dense:
                bad += load_targets(q, sample, first + done, m, t.targets)
            if done < direct:
                if logit is double:
                    run_lines(
                        q, t, x + done, x_row, m // q.line, <f64 *>label, <f64 *>t.scores, grad + done, grad_row,
                        q.past_caches,
                    )
                else:
                    run_lines(
                        q, t, x + done, x_row, m // q.line, <f32 *>label, <f32 *>t.scores, grad + done, grad_row,
                        q.past_caches,
                    )
            else:
                if logit is double:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <double *>label, <uint64_t *>t.staged,
                        <double *>t.staged, <f64 *>t.scores,
                    )
                elif logit is float:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <float *>label, <uint32_t *>t.staged,
                        <float *>t.staged, <f32 *>t.scores,
                    )
                else:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <float *>label, <uint16_t *>t.staged,
                        <logit *>t.staged, <f32 *>t.scores,
                    )
            done += m
        if q.grad == NULL:
            if logit is double:
                flush(q, <f64 *>t.sums, <double *>t.sums, sums)
            else:
                flush(q, <f32 *>t.sums, <float *>t.sums, sums)
        first += n
    STREAMED()
    return bad


cdef void load_factors(const Problem *q, const double *cotangent, char *factors) noexcept nogil:
    """The cotangents of I, p times those of P, and those of H, L, B+ and B-, as numbers."""
    cdef Py_ssize_t c, row = q.samples * q.classes
    for c in range(q.classes):
        load_factor(q, factors, c, cotangent[c])
        load_factor(q, factors, q.classes + c, q.power * cotangent[row + c])
        if q.entropy:
            load_factor(q, factors, 2 * q.classes + c, cotangent[3 * row + c])
        if q.smoothing:
            load_factor(q, factors, 3 * q.classes + c, cotangent[q.row_l * row + c])
        if q.binary:
            load_factor(q, factors, 4 * q.classes + c, cotangent[q.row_b * row + c])
            load_factor(q, factors, 5 * q.classes + c, cotangent[(q.row_b + 1) * row + c])


cdef inline void load_factor(const Problem *q, char *factors, Py_ssize_t i, double factor) noexcept nogil:
    if q.number == sizeof(double):
        (<double *>factors)[i] = factor
    else:
        (<float *>factors)[i] = <float>factor


# ---- the whole problem -----------------------------------------------------------------------------------------------

cdef inline Py_ssize_t cache_lines(Py_ssize_t size) noexcept nogil:
    """Bytes, or an address, rounded up to whole cache lines, so that threads share none."""
    return (size + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef inline Py_ssize_t vector_size(const Problem *q) noexcept nogil:
    """Bytes of the vectors that compute it; where they are single numbers, doubles are larger."""
    return sizeof(f64) if q.number == sizeof(double) else sizeof(f32)


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
        cdef Py_ssize_t staged = scores
        cdef Py_ssize_t scale = cache_lines(q.block * q.number)
        cdef Py_ssize_t label = cache_lines(TILE * q.number)
        cdef Py_ssize_t sums = cache_lines(q.sums * q.classes * vector_size(q))
        cdef Py_ssize_t factors = cache_lines(6 * q.classes * q.number)
        cdef Py_ssize_t targets = scores if q.dense else 0
        cdef Py_ssize_t pivot = 2 * scale if not q.plain else 0
        cdef Py_ssize_t size = staged + scores + 2 * scale + label + targets + pivot + sums + factors
        cdef Py_ssize_t i
        cdef char *at
        self.memory = <char *>malloc(threads * size + CACHE_LINE)
        self.of_thread = <Scratch *>malloc(threads * sizeof(Scratch))
        if self.memory == NULL or self.of_thread == NULL:
            raise MemoryError
        at = <char *>cache_lines(<uintptr_t>self.memory)
        for i in range(threads):
            self.of_thread[i].staged = at
            self.of_thread[i].scores = self.of_thread[i].staged + staged
            self.of_thread[i].scale = self.of_thread[i].scores + scores
            self.of_thread[i].entropy = self.of_thread[i].scale + scale
            self.of_thread[i].label = self.of_thread[i].entropy + scale
            self.of_thread[i].targets = self.of_thread[i].label + label
            self.of_thread[i].pivot = self.of_thread[i].targets + targets
            self.of_thread[i].sums = self.of_thread[i].pivot + pivot
            self.of_thread[i].factors = self.of_thread[i].sums + sums
            memset(self.of_thread[i].sums, 0, sums)
            at += size
        return 0


cdef void add_axis(Axes *axes, Py_ssize_t size, Py_ssize_t logits, Py_ssize_t labels, Py_ssize_t grad) noexcept nogil:
    """Inserts an axis so that the logits' longest strides stay outermost."""
    cdef int i = axes.count
    while i > 0 and llabs(axes.logits[i - 1]) < llabs(logits):
        axes.size[i] = axes.size[i - 1]
        axes.logits[i] = axes.logits[i - 1]
        axes.labels[i] = axes.labels[i - 1]
        axes.grad[i] = axes.grad[i - 1]
        i -= 1
    axes.size[i] = size
    axes.logits[i] = logits
    axes.labels[i] = labels
    axes.grad[i] = grad
    axes.count += 1


cdef void merge_axes(Axes *axes) noexcept nogil:
    """Makes one of neighbouring axes where every array's memory allows it; at least one remains."""
    cdef int i, last = 0
    if axes.count == 0:
        add_axis(axes, 1, 0, 0, 0)
    for i in range(1, axes.count):
        if (
            axes.logits[last] == axes.size[i] * axes.logits[i]
            and axes.labels[last] == axes.size[i] * axes.labels[i]
            and axes.grad[last] == axes.size[i] * axes.grad[i]
        ):
            axes.size[last] *= axes.size[i]
        else:
            last += 1
            axes.size[last] = axes.size[i]
        axes.logits[last] = axes.logits[i]
        axes.labels[last] = axes.labels[i]
        axes.grad[last] = axes.grad[i]
    axes.count = last + 1


cdef inline Py_ssize_t whole(double gamma) noexcept:
    """gamma as the power to multiply out, 0 if it is none."""
    return <Py_ssize_t>gamma if gamma <= MAX_POWER and gamma == <Py_ssize_t>gamma else 0


cdef int describe(Problem *q, logits_buffer, labels_buffer, grad_buffer, spec) except -1:
    """The problem of these Buffers; grad_buffer is None for the statistics."""
    cdef Py_ssize_t size
    cdef int i
    logits, labels = logits_buffer.layout, labels_buffer.layout
    grad = logits if grad_buffer is None else grad_buffer.layout
    q.logits = <const char *><uintptr_t>logits_buffer.address
    q.labels = <const char *><uintptr_t>labels_buffer.address
    q.grad = NULL if grad_buffer is None else <char *><uintptr_t>grad_buffer.address
    q.dtype = _DTYPES[logits.dtype]
    q.itemsize = logits.itemsize
    q.number = max(4, q.itemsize)
    shape, logits_strides, labels_strides, grad_strides = logits.shape, logits.strides, labels.strides, grad.strides
    q.samples, q.channels = shape[:2]
    q.classes = spec.classes(q.channels)  # a single channel has a background too
    q.logits_n, q.logits_c = logits_strides[:2]
    q.labels_n = labels_strides[0]
    q.grad_n, q.grad_c = grad_strides[:2]
    q.power = spec.power
    q.sums = len(spec.statistics)
    q.entropy = spec.gamma is not None
    q.gamma = spec.gamma or 0
    q.focal = q.gamma > 0
    q.whole_gamma = whole(q.gamma)
    q.plain = spec.plain
    q.activation = _ACTIVATIONS[spec.activation]
    q.dense = spec.dense
    q.smoothing = spec.smoothing
    q.binary = spec.binary_gamma is not None
    q.binary_gamma = spec.binary_gamma or 0
    q.whole_binary_gamma = whole(q.binary_gamma)
    q.row_l = 3 + q.entropy
    q.row_b = q.row_l + q.smoothing
    q.row_v = q.row_b + 2 * q.binary
    ignore = spec.ignore_label
    if q.dense:
        q.target_dtype = _TARGETS[labels.dtype]
        q.labels_c = labels_strides[1]
        q.has_ignore = ignore is not None
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
            add_axis(&q.axes, size, logits_strides[i], labels_strides[i if q.dense else i - 1], grad_strides[i])
    merge_axes(&q.axes)

    # Past the caches a whole line needs not be read to be written; but a fresh page was just cleared in them.
    q.past_caches = (
        q.grad != NULL and q.grad != q.logits and q.axes.count == 1
        and not (<uintptr_t>q.grad | <uintptr_t>q.grad_n | <uintptr_t>q.grad_c) % CACHE_LINE
        and is_mapped(q.grad, q.voxels * q.itemsize)
    )
    q.line = VECTORS * vector_size(q) // q.number
    q.block = max(BLOCK_SCORES // q.classes, min(MANY_VOXELS, MANY_SCORES // q.classes), q.line)
    q.block = min(TILE, q.block) // q.line * q.line
    q.chunk = max(CHUNK_SCORES // q.classes, (q.voxels + MAX_CHUNKS - 1) // MAX_CHUNKS, 1)
    q.chunk = padded(q.chunk, CHUNK_STEP)
    q.chunks = (q.voxels + q.chunk - 1) // q.chunk
    return 0


cdef int team(const Problem *q, threads) except -1:
    """How many threads: each is to have work that is worth waking it for."""
    cdef Py_ssize_t worth = q.samples * q.voxels * q.classes // THREAD_SCORES
    return max(1, min(worth, threads, q.samples * q.chunks)) if DICE_OPENMP else 1


cdef Py_ssize_t run_chunks(
    const Problem *q, const Scratch *of_thread, int workers, const double *cotangent, double *sums
) noexcept nogil:
    """Every chunk of every sample; sums are (samples, chunks, K, classes). Returns how many bad labels."""
    cdef Py_ssize_t i, bad = 0
    cdef const Scratch *t
    for i in prange(q.samples * q.chunks, num_threads=workers, schedule="static"):
        t = &of_thread[threadid()]
        if q.dtype == 0:
            bad += run_chunk(q, i, t, cotangent, sums, <float16 *>NULL)
        elif q.dtype == 1:
            bad += run_chunk(q, i, t, cotangent, sums, <bfloat16 *>NULL)
        elif q.dtype == 2:
            bad += run_chunk(q, i, t, cotangent, sums, <float *>NULL)
        else:
            bad += run_chunk(q, i, t, cotangent, sums, <double *>NULL)
    return bad


def statistics(logits, labels, sums, spec, threads):
    """Fills sums, (K, N, C) contiguous float64, with what is asked for. Returns how many labels were out of range."""
    cdef Problem q
    describe(&q, logits, labels, None, spec)
    cdef Py_ssize_t width = q.sums * q.classes
    cdef Py_ssize_t j, k, n, c, bad
    cdef int workers = team(&q, threads)
    cdef double *out = <double *><uintptr_t>sums.address
    cdef double total
    cdef Workspace workspace = Workspace()
    workspace.allocate(&q, workers)
    cdef double *partial = <double *>calloc(max(1, q.samples * q.chunks * width), sizeof(double))
    if partial == NULL:
        raise MemoryError
    with nogil:
        bad = run_chunks(&q, workspace.of_thread, workers, NULL, partial)
        for k in range(q.sums):
            for n in range(q.samples):
                for c in range(q.classes):
                    total = 0
                    for j in range(q.chunks):
                        total += partial[(n * q.chunks + j) * width + k * q.classes + c]
                    out[(k * q.samples + n) * q.classes + c] = total
        free(partial)
    return bad


def gradient(logits, labels, cotangent, grad, spec, threads):
    """Fills grad, the logits' shape and dtype, for cotangents (K, N, C) contiguous float64. Returns the bad labels."""
    cdef Problem q
    describe(&q, logits, labels, grad, spec)
    cdef Py_ssize_t bad
    cdef int workers = team(&q, threads)
    cdef const double *factors = <const double *><uintptr_t>cotangent.address
    cdef Workspace workspace = Workspace()
    workspace.allocate(&q, workers)
    with nogil:
        bad = run_chunks(&q, workspace.of_thread, workers, factors, NULL)
    return bad


def elementwise(name, x, out):
    """Fills out with exp or log of x as the kernels have it, for their tests: float32 or float64, a multiple of 64
    numbers.
    """
    cdef Py_ssize_t i
    cdef const char *numbers = <const char *><uintptr_t>x.address
    cdef char *to = <char *><uintptr_t>out.address
    cdef f32 v
    cdef f64 w
    cdef bint exponential = name == "exp"
    if x.dtype == "float32":
        for i in range(x.shape[0] // lanes(&v)):
            load(&v, <const float *>(numbers + i * sizeof(f32)))
            store(<float *>(to + i * sizeof(f32)), exp(v) if exponential else log(v, number(&v, 1) - v))
    else:
        for i in range(x.shape[0] // lanes(&w)):
            load(&w, <const double *>(numbers + i * sizeof(f64)))
            store(<double *>(to + i * sizeof(f64)), exp(w) if exponential else log(w, number(&w, 1) - w))


def unsupported(signature):
    """Reasons why these kernels do not take such calls; none means they do."""
    reasons = []
    shape = signature.logits.shape
    if len(shape) > MAX_AXES:
        reasons.append(f"takes at most {MAX_AXES} axes, not {len(shape)}")
    if shape[1] > MAX_CLASSES:
        reasons.append(f"takes at most {MAX_CLASSES} classes, not {shape[1]}")
    return reasons


LEVEL = DICE_LEVEL.decode()


def processor_runs(level):
    """Whether this processor runs code compiled for `level`, one of "x86-64-v3" and "x86-64-v4"."""
    return bool(processor_has({"x86-64-v3": 3, "x86-64-v4": 4}[level]))


def openmp():
    """(version, library): the OpenMP date compiled against, 0 without OpenMP, and the file of the runtime in use."""
    return DICE_OPENMP, openmp_library().decode()
