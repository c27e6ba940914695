// Memory of the null GPU. Pages exist once they are written, so 80 GiB cost nothing. What is freed reads as NaN until
// its addresses are used again, and cannot be written; of large allocations it is unmapped at once.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "memory.h"
#include "null_gpu.h"
#include "streams.h"

#define OK cudaSuccess
#define ONES (2ul << 20)
#define KEPT_MAPPINGS 4096  // of freed memory; a process may have 65,530 mappings

// cudaPointerGetAttributes is how torch and NCCL learn on which side a pointer is.
typedef struct range {
    char *start;
    size_t size;
    enum memory_kind kind;
    int gpu, device, file;
    int is_charged;
    struct range *next;
} range;
static range *ranges, *freed, **last_freed = &freed;
static size_t kept_mappings;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int ones = -1;  // a file of ONES bytes, mapped again and again: it costs nothing until it is written

static void make_ones(void) {
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&making);
    if (ones < 0) {
        char *full = malloc(ONES);
        memset(full, 0xff, ONES);
        int file = memfd_create("null_gpu_ones", MFD_CLOEXEC);
        if (write(file, full, ONES) != (ssize_t)ONES) abort();
        free(full);
        ones = file;
    }
    pthread_mutex_unlock(&making);
}

void null_gpu_map_ones(void *start, size_t size, int protection) {
    make_ones();
    for (size_t at = 0; at < size; at += ONES) {
        size_t part = size - at < ONES ? size - at : ONES;
        if (mmap((char *)start + at, part, protection, MAP_PRIVATE | MAP_FIXED, ones, 0) == MAP_FAILED) abort();
    }
}

static void remember(range made) {
    range *kept = malloc(sizeof *kept);
    pthread_mutex_lock(&lock);
    made.next = ranges;
    *kept = made;
    ranges = kept;
    pthread_mutex_unlock(&lock);
}

static range *forget(char *start) {
    range *found = 0;
    pthread_mutex_lock(&lock);
    for (range **at = &ranges; *at && !found; at = &(*at)->next)
        if ((*at)->start == start) {
            found = *at;
            *at = found->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    if (found && found->is_charged) null_gpu_charge(found->gpu, -(int64_t)found->size);
    if (found && (found->kind == PINNED || found->kind == REGISTERED)) charge_pinned(-(int64_t)found->size);
    return found;
}

static range *range_of(const char *pointer) {  // under the lock
    range *at = ranges;
    while (at && !(pointer >= at->start && pointer < at->start + at->size)) at = at->next;
    return at;
}

enum memory_kind reward_kind(const void *pointer) {
    pthread_mutex_lock(&lock);
    range *found = range_of(pointer);
    enum memory_kind kind = found ? found->kind : PAGEABLE;
    pthread_mutex_unlock(&lock);
    return kind == REGISTERED ? PINNED : kind;
}

void *null_gpu_allocate(size_t asked, int kind) {
    size_t size = asked ? (asked + 4095) & ~4095ul : 4096;
    if (size < asked || (kind == DEVICE && !null_gpu_charge(current_gpu(), size))) return 0;
    char *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        if (kind == DEVICE) null_gpu_charge(current_gpu(), -(int64_t)size);
        return 0;
    }
    if (kind == PINNED && !charge_pinned(size)) {
        munmap(start, size);
        return 0;
    }
    remember((range){start, size, kind, current_gpu(), current_device(), -1, kind == DEVICE, 0});
    return start;
}

static size_t mappings(range *r) { return (r->size + ONES - 1) / ONES; }

// Keep the addresses of freed device memory, full of NaN, until there are too many mappings.
static void quarantine(range *found) {
    null_gpu_map_ones(found->start, found->size, PROT_READ);
    pthread_mutex_lock(&lock);
    found->next = 0;
    *last_freed = found;
    last_freed = &found->next;
    kept_mappings += mappings(found);
    while (kept_mappings > KEPT_MAPPINGS) {
        range *oldest = freed;
        freed = oldest->next;
        if (!freed) last_freed = &freed;
        kept_mappings -= mappings(oldest);
        munmap(oldest->start, oldest->size);
        free(oldest);
    }
    pthread_mutex_unlock(&lock);
}

void null_gpu_free(void *start) {
    range *found = forget(start);
    if (!found) return;
    if (found->kind == DEVICE && found->file >= 0) memset(found->start, 0xff, found->size);  // others may have it open
    if (found->file >= 0) close(found->file);
    if (found->kind == DEVICE && mappings(found) <= KEPT_MAPPINGS) {
        quarantine(found);
        return;
    }
    if (found->kind != REGISTERED) munmap(found->start, found->size);
    free(found);
}

// Zeros that cost memory only where they are written over: engines clear caches that they hardly use.
void null_gpu_zero(char *start, size_t size) {
    char *from = (char *)(((uintptr_t)start + 4095) & ~4095ul), *to = (char *)((uintptr_t)(start + size) & ~4095ul);
    pthread_mutex_lock(&lock);
    range *found = range_of(start);
    int is_own = found && found->kind == DEVICE && found->file < 0 && start + size <= found->start + found->size;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    if (is_own && size >= ONES && mmap(from, to - from, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED) {
        memset(start, 0, from - start);
        memset(to, 0, start + size - to);
    } else
        memset(start, 0, size);
    pthread_mutex_unlock(&lock);
}

void null_gpu_mapped(void *start, size_t size, int gpu) {
    remember((range){start, size, DEVICE, gpu, current_device(), -1, 0, 0});
}
void null_gpu_unmapped(void *start) { free(forget(start)); }

// Between processes: memory of which a handle is made moves, at its address, into a file without a name, which others
// open through /proc. Only for this the device is waited for.
typedef struct { size_t size; pid_t pid; int file; size_t offset; } shared_memory;

static void move_into_file(range *found) {
    int file = memfd_create("null_gpu", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, found->size)) abort();
    for (size_t done = 0; done < found->size;) {
        ssize_t wrote = pwrite(file, found->start + done, found->size - done, done);
        if (wrote <= 0) abort();
        done += wrote;
    }
    if (mmap(found->start, found->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) abort();
    found->file = file;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
    pthread_mutex_lock(&lock);
    range *found = range_of(pointer);
    int device = found && found->file < 0 ? found->device : -1;
    pthread_mutex_unlock(&lock);
    if (device >= 0) wait_for_device(device, WAIT_FREE);
    pthread_mutex_lock(&lock);
    found = range_of(pointer);
    if (found && found->file < 0) move_into_file(found);
    memset(handle, 0, sizeof *handle);
    if (found) *(shared_memory *)handle = (shared_memory){found->size, getpid(), found->file, 0};
    pthread_mutex_unlock(&lock);
    return found ? OK : cudaErrorInvalidValue;
}
cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned flags) {
    shared_memory shared = *(shared_memory *)&handle;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", shared.pid, shared.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return cudaErrorMapBufferObjectFailed;
    *pointer = mmap(0, shared.size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (*pointer == MAP_FAILED) return cudaErrorMapBufferObjectFailed;
    remember((range){*pointer, shared.size, OPENED, current_gpu(), current_device(), -1, 0, 0});
    return OK;
}
cudaError_t cudaIpcCloseMemHandle(void *pointer) { null_gpu_free(pointer); return OK; }

static cudaError_t allocated(void **pointer, size_t size, enum memory_kind kind) {
    *pointer = null_gpu_allocate(size, kind);
    return *pointer ? OK : cudaErrorMemoryAllocation;
}
static cudaError_t release(void *p) {  // CUDA waits for the device first
    if (p) wait_for_device(current_device(), WAIT_FREE);
    null_gpu_free(p);
    return OK;
}

cudaError_t cudaMalloc(void **p, size_t n) { return allocated(p, n, DEVICE); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return allocated(p, n, PINNED); }
cudaError_t cudaMallocHost(void **p, size_t n) { return allocated(p, n, PINNED); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaFreeHost(void *p) { return release(p); }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) {
    if (!charge_pinned(n)) return cudaErrorMemoryAllocation;
    remember((range){p, n, REGISTERED, current_gpu(), current_device(), -1, 0, 0});
    return OK;
}
cudaError_t cudaHostUnregister(void *p) { null_gpu_free(p); return OK; }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { *device = host; return OK; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return allocated(p, 4096, DEVICE); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { memory_info(current_gpu(), left, total); return OK; }

typedef struct { op base; void *start; } release_op;
static void release_in_turn(op *o, stream *s) { null_gpu_free(((release_op *)o)->start); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return allocated(p, n, DEVICE); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) {
    release_op *made = new_op(sizeof *made, release_in_turn);
    made->start = p;
    return enqueue(stream_of(s), &made->base);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
    pthread_mutex_lock(&lock);
    range *at = range_of(p);
    enum memory_kind kind = at ? at->kind : PAGEABLE;
    memset(found, 0, sizeof *found);
    found->type = kind == DEVICE || kind == OPENED ? cudaMemoryTypeDevice
                : kind == PAGEABLE ? cudaMemoryTypeUnregistered : cudaMemoryTypeHost;
    found->device = at ? at->device : current_device();
    found->devicePointer = at ? (void *)p : 0;
    found->hostPointer = kind == PINNED || kind == REGISTERED ? (void *)p : 0;
    pthread_mutex_unlock(&lock);
    return OK;
}
