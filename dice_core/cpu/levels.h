/* Queries of the processor and the operating system. */
#ifndef DICE_LEVELS_H
#define DICE_LEVELS_H

#include <stddef.h>
#include <stdint.h>

/* The instruction set this file is compiled for. */
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

/* Whether the processor and the operating system support x86-64-v3 or x86-64-v4. Older compilers cannot test all of
   x86-64-v3 by name; every processor with AVX2, FMA and BMI2 has F16C, LZCNT and MOVBE too. */
static int processor_supports(int version) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")))
        return 0;
    return version < 4 || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl"));
#else
    return version == 0;
#endif
}

/* Whether the first and the last page of this memory are resident; 0 if unknown. */
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
static int is_resident(const void *memory, size_t size) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)memory, last = first + size - 1;
    unsigned char a, b;
    return size > 0 && mincore((void *)(first / page * page), 1, &a) == 0 &&
           mincore((void *)(last / page * page), 1, &b) == 0 && (a & b & 1);
}
#else
static int is_resident(const void *memory, size_t size) { return (void)memory, (void)size, 0; }
#endif

/* The version of OpenMP, 0 without it, and the file of its runtime library. */
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

#endif
