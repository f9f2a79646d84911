/* The parallel loop: its threads, and signals while it runs. */
#ifndef DICE_PARALLEL_H
#define DICE_PARALLEL_H

#include <Python.h>
#include <time.h>

#include "levels.h"

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <sys/syscall.h>
#endif

/* ---- fork ----

   GNU OpenMP keeps the threads of a parallel region for the next one. They do not survive fork, and the child would
   wait for them for ever. Another library may have started them, so what counts is whether the parent had any. */

static int single_threaded; /* whether this process was forked, without exec, from one with several threads */
static int has_started;     /* whether this process has run on several threads */

/* The flags and the number of threads of a process; 0 if unknown. */
static int read_process(long id, unsigned long *flags, long *threads) {
#if defined(__linux__)
    char path[32], text[1024], *fields;
    ssize_t size = -1;
    int file;
    snprintf(path, sizeof path, "/proc/%ld/stat", id);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    size = read(file, text, sizeof text - 1);
    close(file);
    text[size < 0 ? 0 : size] = 0;
    fields = strrchr(text, ')'); /* the end of the name, which may contain anything */
    return fields && sscanf(fields + 1, "%*s %*s %*s %*s %*s %*s %lu %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %ld", flags,
                            threads) == 2;
#else
    return (void)id, (void)flags, (void)threads, 0;
#endif
}

static int parent_has_threads(void) {
    unsigned long flags;
    long threads;
    return !read_process(getppid(), &flags, &threads) || threads > 1;
}

static void after_fork(void) { single_threaded = single_threaded || has_started || parent_has_threads(); }

/* To be called once. This module may be loaded only after the fork. */
static void watch_forks(void) {
    const unsigned long forked = 0x40; /* PF_FORKNOEXEC */
    unsigned long flags = 0;
    long threads;
    read_process(getpid(), &flags, &threads);
    single_threaded = flags & forked && parent_has_threads();
    pthread_atfork(NULL, NULL, after_fork);
}

/* ---- threads that cannot be started ----

   OpenMP's runtime ends the process if it cannot start a thread, so that is tried first. */

typedef struct {
    pthread_t thread;
    pthread_mutex_t *gate;
    long id;
} Trial;

static void *wait_at_gate(void *argument) {
    Trial *trial = (Trial *)argument;
    pthread_mutex_lock(trial->gate);
    pthread_mutex_unlock(trial->gate);
#if defined(__linux__)
    trial->id = syscall(SYS_gettid);
#endif
    return NULL;
}

/* OMP_STACKSIZE in bytes, 0 if it is not set or invalid. */
static size_t omp_stack_size(void) {
    static const char units[] = "bkmgBKMG";
    const char *text = getenv("OMP_STACKSIZE");
    unsigned long long size;
    char unit = 'k';
    int shift;
    if (text == NULL || strchr(text, '-') || sscanf(text, "%llu %c", &size, &unit) < 1 || strchr(units, unit) == NULL)
        return 0;
    shift = 10 * ((strchr(units, unit) - units) % 4);
    return size <= SIZE_MAX >> shift ? size << shift : 0;
}

/* Whether so many threads can be started. */
static int can_start(int count) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    Trial *trials = (Trial *)malloc(count * sizeof(Trial));
    size_t stack = omp_stack_size();
    int i, started = 0;
    if (trials == NULL)
        return 0;
    pthread_attr_init(&attributes);
    if (stack)
        pthread_attr_setstacksize(&attributes, stack);
    pthread_mutex_lock(&gate);
    for (; started < count; started++) {
        trials[started].gate = &gate;
        if (pthread_create(&trials[started].thread, &attributes, wait_at_gate, &trials[started]))
            break;
    }
    pthread_mutex_unlock(&gate);
    for (i = 0; i < started; i++)
        pthread_join(trials[i].thread, NULL);
#if defined(__linux__)
    for (i = 0; i < started; i++) /* a thread counts towards the limits until it is gone */
        while (syscall(SYS_tgkill, getpid(), trials[i].id, 0) == 0)
            sched_yield();
#endif
    pthread_attr_destroy(&attributes);
    free(trials);
    return started == count;
}

/* How many threads to use: `wanted`, or 1 if not so many can be. */
static int usable_threads(int wanted) {
    static __thread int running = 1; /* OpenMP has this many threads ready for the calling thread */
    if (wanted <= 1 || single_threaded || (wanted > running && !can_start(wanted - 1)))
        return 1;
    has_started = 1;
    return running = wanted;
}
#else
static void watch_forks(void) {}
static int usable_threads(int wanted) { return DICE_OPENMP ? wanted : 1; }
#endif

/* ---- the loop ---- */

#if defined(_OPENMP)
#define seconds() omp_get_wtime()
#define thread_number() omp_get_thread_num()
#else
#define seconds() ((double)clock() / CLOCKS_PER_SEC)
#define thread_number() 0
#endif
#define SIGNAL_INTERVAL 0.05 /* seconds */

typedef Py_ssize_t (*Work)(const void *arguments, Py_ssize_t item, int thread);

/* The items are divided into shares, one for each thread, of neighbours in memory: what the hardware prefetches past
   the end of one item serves the next, and two threads rarely touch the same fresh page. */
#define SHARES 64 /* at most */
#define STRIDE 8  /* one counter in each cache line */

/* The next item of a share. */
static Py_ssize_t take(Py_ssize_t *next) {
    Py_ssize_t item;
#if DICE_OPENMP >= 201107
#pragma omp atomic capture
#else
#pragma omp critical
#endif
    item = (*next)++;
    return item;
}

/* Calls work for every item < count, without the GIL, and adds up what it returns. A thread that has finished its own
   share takes items from the others': one that shares its core with another process then does less, and the others
   need not wait for it. If `interruptible`, Python's signal handlers run meanwhile, in the calling thread; once one has
   raised an exception no further item is begun, and the result is -1. */
static Py_ssize_t parallel(Work work, const void *arguments, Py_ssize_t count, int threads, int interruptible) {
    PyThreadState *state = PyEval_SaveThread();
    Py_ssize_t next[SHARES * STRIDE], total = 0;
    double checked = interruptible ? seconds() : 0;
    int k, shares = threads < SHARES ? threads : SHARES;
    volatile int interrupted = 0;
    for (k = 0; k < shares; k++)
        next[k * STRIDE] = k * count / shares;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int thread = thread_number(), i;
        for (i = 0; i < shares; i++) {
            int share = (thread + i) % shares;
            Py_ssize_t item, stop = (share + 1) * count / shares;
            while (!interrupted && (item = take(&next[share * STRIDE])) < stop) {
                total += work(arguments, item, thread);
                if (interruptible && thread == 0 && seconds() - checked > SIGNAL_INTERVAL) {
                    PyEval_RestoreThread(state); /* thread 0 is the calling one */
                    interrupted = PyErr_CheckSignals() != 0;
                    state = PyEval_SaveThread();
                    checked = seconds();
                }
            }
        }
    }
    PyEval_RestoreThread(state);
    return interrupted ? -1 : total;
}

#endif
