// Copies and fills of the null GPU, in the queue of their stream, and when the host waits for them, which depends on
// whether its memory is pinned ("API synchronization behavior" in CUDA's reference).
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include "memory.h"
#include "streams.h"

#define STAGED (64 << 10)  // bytes of pageable memory that a call takes along instead of waiting

typedef struct {
    op base;
    char *to;
    const char *from;
    void *staged;
    size_t to_pitch, from_pitch, width, height;
} copy;

static void run_copy(op *o, stream *s) {
    copy *c = (copy *)o;
    for (size_t row = 0; row < c->height; row++)
        memmove(c->to + row * c->to_pitch, c->from + row * c->from_pitch, c->width);
    free(c->staged);
}

static int is_on_device(const void *p) {
    enum memory_kind kind = reward_kind(p);
    return kind == DEVICE || kind == OPENED;
}

static cudaError_t queue_copy(copy wanted, cudaStream_t handle, int is_synchronous) {
    stream *s = stream_of(handle);
    copy *c = new_op(sizeof *c, run_copy);
    op base = c->base;
    *c = wanted;
    c->base = base;
    int must_wait = is_synchronous ? !(is_on_device(c->to) && is_on_device(c->from)) : reward_kind(c->to) == PAGEABLE;
    if (!must_wait && reward_kind(c->from) == PAGEABLE) {
        size_t size = c->height ? (c->height - 1) * c->from_pitch + c->width : 0;
        must_wait = size > STAGED;
        if (!must_wait) c->from = memcpy(c->staged = malloc(size + 1), c->from, size);
    }
    if (must_wait && is_idle(s)) {  // the host waits: it may as well copy
        run_copy(&c->base, s);
        free(c);
    } else {
        cudaError_t error = enqueue(s, &c->base);
        if (error) return error;
    }
    return must_wait ? wait_for_stream(s, WAIT_COPY) : cudaSuccess;
}

static copy plain(void *to, const void *from, size_t size) {
    return (copy){.to = to, .from = from, .to_pitch = size, .from_pitch = size, .width = size, .height = size > 0};
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) {
    return queue_copy(plain(to, from, n), cudaStreamLegacy, 1);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
    return queue_copy(plain(to, from, n), s, 0);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) {
    return queue_copy(plain(to, from, n), s, 0);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind k, cudaStream_t s) {
    copy wanted = {.to = to, .from = from, .to_pitch = to_pitch, .from_pitch = from_pitch, .width = width,
                   .height = height};
    return queue_copy(wanted, s, 0);
}

typedef struct { op base; void *start; int value; size_t size; } fill;
static void run_fill(op *o, stream *s) {
    fill *f = (fill *)o;
    memset(f->start, f->value, f->size);
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) {
    fill *f = new_op(sizeof *f, run_fill);
    f->start = p;
    f->value = value;
    f->size = n;
    return enqueue(stream_of(s), &f->base);
}
cudaError_t cudaMemset(void *p, int value, size_t n) {
    cudaError_t error = cudaMemsetAsync(p, value, n, cudaStreamLegacy);
    return error || is_on_device(p) ? error : wait_for_stream(stream_of(cudaStreamLegacy), WAIT_COPY);
}
