// Queues of the null GPU. A stream is a first-in-first-out queue with a thread of its own; what is queued is an `op`.
#pragma once
#include <cuda_runtime_api.h>
#include <pthread.h>
#include "segment.h"

#define DEVICES 16  // of a process, at most

struct CUstream_st;
typedef struct CUstream_st stream;
typedef struct op {
    struct op *next;
    long ticket;  // place in the order in which this process queued
    void (*run)(struct op *, stream *);  // in the stream's thread, without the lock
} op;

struct CUstream_st {
    int id, device, gpu, is_blocking, is_closed, has_thread;
    op *first, *last;  // `first` stays until it has run
    int has_started;   // `first`, and waits for no other stream
    long queued, finished;
    pthread_cond_t filled;
    stream_record *record;
    stream *next;
};

// One lock for all queues and events of the process; `queues_changed` is signaled when an op has run.
extern pthread_mutex_t queues;
extern pthread_cond_t queues_changed;

int current_gpu(void);     // of this thread, among all GPUs
int current_device(void);  // of this thread, among the visible ones

stream *stream_of(cudaStream_t handle);             // 0, 1 and 2 are CUDA's names of default streams
void *new_op(size_t size, void (*run)(op *, stream *));
cudaError_t enqueue(stream *s, op *made);           // the op is freed when it has run
void enqueue_locked(stream *s, op *made);
int is_idle(stream *s);                             // nothing is queued that an op of this stream would wait for
cudaError_t wait_for_stream(stream *s, enum wait kind);
cudaError_t wait_for_device(int device, enum wait kind);
void wait_behind(stream *s, stream *other);         // under the lock, in s's thread: until something changes
cudaError_t null_gpu_launch(void *handle);            // a kernel, which does nothing
