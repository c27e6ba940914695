// libnvidia-ml.so.1 of the null GPU: what vLLM reads about devices before it initializes CUDA.
#include <stdio.h>
#include "null_gpu.h"

#define NOT_SUPPORTED 3
typedef struct { unsigned long long total, free, used; } memory;

int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "error of the null GPU"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, DRIVER_VERSION); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = CUDA_VERSION_NUMBER; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA_VERSION_NUMBER; return 0; }

// A handle is the device's index plus one: a null handle would be taken for an error.
int nvmlDeviceGetCount_v2(unsigned *n) { *n = all_gpus(); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(index + 1ul);
    return index < (unsigned)all_gpus() ? 0 : 2;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) { *handle = (void *)1; return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) { snprintf(text, size, NAME); return 0; }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    snprintf(text, size, "GPU-00010203-0405-0607-0809-0a0b0c0d0e%02lx", (unsigned long)handle);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = MAJOR;
    *minor = MINOR;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory *found) {
    *found = (memory){gpu_bytes(), gpu_bytes(), 0};
    return 0;
}
int nvmlDeviceGetP2PStatus(void *a, void *b, int which, int *status) { *status = 0; return 0; }

int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetComputeRunningProcesses(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetComputeRunningProcesses_v3(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetFieldValues(void) { return NOT_SUPPORTED; }
// torch asks when it makes a growing segment, and stops where the call fails: these GPUs are in no fabric.
typedef struct { unsigned version; unsigned char cluster[16]; int status; unsigned clique; unsigned char state; } fabric;
int nvmlDeviceGetGpuFabricInfoV(void *handle, fabric *found) {
    *found = (fabric){.version = found->version};
    return 0;
}
