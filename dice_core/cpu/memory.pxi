"""Memory: the address of a voxel for any strides, and copies to and from scratch."""


# ---- sizes -----------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t padded(Py_ssize_t n, Py_ssize_t multiple) noexcept nogil:
    """n rounded up to a multiple."""
    return (n + multiple - 1) // multiple * multiple


cdef inline Py_ssize_t vector_size(const Problem *q) noexcept nogil:
    """Bytes of the vectors used for the problem. If they are scalars, doubles are larger than floats."""
    return sizeof(f64) if q.real_size == sizeof(double) else sizeof(f32)


# ---- axes ------------------------------------------------------------------------------------------------------------

cdef void add_axis(Axes *axes, Py_ssize_t size, Py_ssize_t logits, Py_ssize_t labels, Py_ssize_t grad) noexcept nogil:
    """Inserts an axis, in the order of the logits' strides, the longest outermost."""
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
    """Merges neighbouring axes that have a common stride in every array. At least one axis remains."""
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


cdef struct Place:
    # Byte offsets of a voxel within its sample, and the number of voxels from it to the end of the innermost axis.
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


# ---- scratch ---------------------------------------------------------------------------------------------------------

cdef inline uint64_t rotated(uint64_t bits, Py_ssize_t n) noexcept nogil:
    """bits rotated left."""
    n &= 63
    return bits << n | bits >> (64 - n) if n else bits


cdef Scratch move_scratch(const Problem *q, const Scratch *t, const char *grad) noexcept nogil:
    """The scratch, moved by less than a page so that its rows stay clear of the gradient of a chunk that begins at
    grad.

    Processors tell a load from the stores before it by the lowest 12 bits of the addresses: one that agrees with a
    store that is not done yet waits for it. All rows advance together, so that would happen on every line, and take up
    to four times as long. Only the gradient of few classes, from all of their rows at once, is prone to it.
    """
    cdef Scratch moved = t[0]
    cdef uint64_t clash = 0, bad = 0  # a bit for each of the 64 cache lines of a page
    cdef Py_ssize_t i, c, shift, row = q.block * q.real_size
    for i in range((TILE + q.block - 1) // q.block):
        for c in range(q.channels):
            clash |= rotated(0x3FF, (<Py_ssize_t>grad + i * q.block * q.itemsize + c * q.grad_c) // CACHE_LINE - 8)
    for i in range((t.label - t.e) // row + 1):
        bad |= rotated(clash, -((<Py_ssize_t>t.e + i * row) // CACHE_LINE))
    for shift in range(64):
        if not bad >> shift & 1:
            break
    else:
        return moved
    shift *= CACHE_LINE
    moved.e += shift
    moved.scale += shift
    moved.nll += shift
    moved.rest += shift
    moved.dot += shift
    moved.slope += shift
    moved.own += shift
    moved.label += shift
    moved.targets += shift
    moved.binary += shift
    moved.top += shift
    return moved


# ---- copies ----------------------------------------------------------------------------------------------------------

cdef inline void prefetch(const char *p, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """Prefetches n elements. The hardware prefetcher does not follow the jump from one row to the next."""
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
    """to[j, i] = source[i, j], at least 4 x 4, in squares of 4 x 4, of which the last may overlap its predecessor."""
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
    """to[c, v] = source[c, v] for n voxels a step apart, channels a row apart."""
    if source_row == 1 and step == 1 and n >= 4 and channels >= 4:
        transpose(source, source_step, to, row, n, channels)
    elif source_step == 1 and row == 1 and n >= 4 and channels >= 4:
        transpose(source, source_row, to, step, channels, n)
    else:
        for _ in range(channels):
            if source_step == 1 and step == 1:
                memcpy(to, source, n * sizeof(word))
            elif source_step == 2 and step == 1:  # a constant step lets the compiler vectorise the loop
                copy_words(source, 2, to, 1, n)
            else:
                copy_words(source, source_step, to, step, n)
            source += source_row
            to += row


cdef void gather(const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, word *staged) noexcept nogil:
    """Copies the logits of n voxels to staged, (channels, block)."""
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
    """Copies staged, (channels, block), to the gradient of n voxels."""
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
    """Sets staged, (channels, block), to 0 where the label is negative: NaN times 0 would still be NaN."""
    cdef Py_ssize_t v
    for _ in range(q.channels):
        for v in range(n):
            staged[v] = staged[v] if label[v] >= 0 else 0
        staged += q.block
