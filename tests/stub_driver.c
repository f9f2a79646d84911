/* A stub of NVIDIA's driver: logs every call to STUB_LOG, and the one named by STUB_FAILS fails. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
#define CALL(...) do { Result r_ = say(__func__, __VA_ARGS__); if (r_) return r_; } while (0)

static __thread uintptr_t stack[16];
static __thread int depth;

static Result say(const char *name, const char *format, long long a, long long b)
{
    const char *log = getenv("STUB_LOG"), *fails = getenv("STUB_FAILS");
    FILE *file = log ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%s", name);
        fprintf(file, format, a, b);
        fputc('\n', file);
        fclose(file);
    }
    return fails && !strcmp(fails, name) ? 700 : 0;
}

static int devices(void) { const char *n = getenv("STUB_DEVICES"); return n ? atoi(n) : 2; }

Result cuInit(unsigned flags) { CALL(" %lld", flags, 0); return devices() < 0 ? 100 : 0; }
Result cuGetErrorName(int code, const char **text) { *text = code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_ILLEGAL_ADDRESS"; return 0; }
Result cuGetErrorString(int code, const char **text) { *text = code == 100 ? "no CUDA-capable device is detected" : "an illegal memory access was encountered"; return 0; }
Result cuDriverGetVersion(int *version) { const char *v = getenv("STUB_VERSION"); *version = v ? atoi(v) : 13020; return 0; }
Result cuStreamSynchronize(void *stream) { CALL(" %lld", (uintptr_t)stream, 0); return 0; }
Result cuDeviceGetCount(int *count) { *count = devices(); return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
Result cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stub %d", device); return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute != 75 ? 0 : device == 40 ? 9 : 12; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { CALL(" %lld", device, 0); *context = (void *)(uintptr_t)(1000 + device); return 0; }
Result cuCtxGetCurrent(void **context) { *context = depth ? (void *)stack[depth - 1] : NULL; return 0; }
Result cuCtxPushCurrent_v2(void *context) { CALL(" %lld", (uintptr_t)context, 0); stack[depth++] = (uintptr_t)context; return 0; }
Result cuCtxPopCurrent_v2(void **context) { CALL("", 0, 0); *context = (void *)stack[--depth]; return 0; }
Result cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) { CALL(" %llx", *(const uint32_t *)code, 0); *library = (void *)7; return 0; }
Result cuLibraryGetKernel(void **kernel, void *library, const char *name) { CALL(" %lld", name && !strcmp(name, "kernel"), 0); *kernel = (void *)8; return 0; }
Result cuKernelGetFunction(void **function, void *kernel) { CALL(" %lld", (uintptr_t)kernel, 0); *function = kernel; return 0; }
Result cuEventCreate(void **event, unsigned flags) { CALL(" %lld", flags, 0); *event = (void *)9; return 0; }
Result cuEventRecord(void *event, void *stream) { CALL(" %lld", (uintptr_t)stream, 0); return 0; }
Result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { CALL(" %lld", (uintptr_t)stream, 0); return 0; }
Result cuEventDestroy_v2(void *event) { CALL("", 0, 0); return 0; }

Result cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c, unsigned shared, void *stream, void **parameters, void **extra)
{
    const char *log = getenv("STUB_LOG");
    if (parameters || (uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2 || extra[4] || y != 1 || z != 1 || b != 1 || c != 1 || shared) return 1;
    CALL(" blocks %lld threads %lld", x, threads);
    if (log) {
        FILE *file = fopen(log, "a");
        size_t size = *(size_t *)extra[3];
        fprintf(file, "  kernel %lld context %lld stream %lld:", (long long)(uintptr_t)kernel, depth ? (long long)stack[depth - 1] : 0, (long long)(uintptr_t)stream);
        for (size_t i = 0; i < size / 8; i++) fprintf(file, " %llx", ((unsigned long long *)extra[1])[i]);
        fputc('\n', file);
        fclose(file);
    }
    return 0;
}
