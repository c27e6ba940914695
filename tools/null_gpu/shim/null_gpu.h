// What the null GPU claims to be, for its three libraries: an H100 with 80 GiB, as many as NULL_GPUS says.
#pragma once
#include <stdlib.h>
#include <string.h>

#define NAME "NVIDIA H100 (null)"
#define MEMORY_BYTES (80ul << 30)
#define CUDA_VERSION_NUMBER 13000
#define DRIVER_VERSION "580.65.06"
#define MAJOR (architecture() / 10)
#define MINOR (architecture() % 10)
#define MULTIPROCESSORS 132
#define WARP 32
#define THREADS_PER_BLOCK 1024
#define THREADS_PER_MULTIPROCESSOR 2048
#define REGISTERS 65536
#define SHARED_PER_BLOCK 49152
#define SHARED_PER_BLOCK_OPTIN 232448
#define SHARED_PER_MULTIPROCESSOR 233472
#define L2_BYTES (50 << 20)

static inline int architecture(void) {
    const char *number = getenv("NULL_GPU_ARCHITECTURE");
    return number ? atoi(number) : 90;
}

static inline long gpu_bytes(void) {
    const char *number = getenv("NULL_GPU_BYTES");
    return number ? atol(number) : (long)MEMORY_BYTES;
}

static inline int all_gpus(void) {
    const char *number = getenv("NULL_GPUS");
    return number ? atoi(number) : 1;
}

// The GPU that this process numbers `device`, or -1: CUDA_VISIBLE_DEVICES lists numbers of GPUs.
static inline int gpu_of(int device) {
    const char *listed = getenv("CUDA_VISIBLE_DEVICES");
    if (!listed) return device < all_gpus() ? device : -1;
    for (; *listed && device; device--) {
        listed += strcspn(listed, ",");
        listed += *listed == ',';
    }
    int gpu = *listed ? atoi(listed) : -1;
    return gpu < all_gpus() ? gpu : -1;
}

static inline int num_gpus(void) {
    int number = 0;
    while (gpu_of(number) >= 0) number++;
    return number;
}

// A value for a device attribute that both APIs number alike (CUdevice_attribute, cudaDeviceAttr).
static inline int attribute(int number) {
    switch (number) {
    case 1: return THREADS_PER_BLOCK;
    case 8: return SHARED_PER_BLOCK;
    case 10: return WARP;
    case 12: return REGISTERS;
    case 16: return MULTIPROCESSORS;
    case 36: return 2600000;  // memory clock, kHz
    case 37: return 5120;     // memory bus, bits
    case 38: return L2_BYTES;
    case 39: return THREADS_PER_MULTIPROCESSOR;
    case 75: return MAJOR;
    case 76: return MINOR;
    case 81: return SHARED_PER_MULTIPROCESSOR;
    case 82: return REGISTERS;
    case 97: return SHARED_PER_BLOCK_OPTIN;
    default: return 1;  // most of the others say whether the device can do something
    }
}
