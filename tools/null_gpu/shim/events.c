// Events of the null GPU: places in queues, which other queues and the host wait for, also in other processes.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "counters.h"
#include "streams.h"

// What processes share of an event. An event that was never recorded counts as passed.
typedef struct { _Atomic long recorded, passed; } marks;
struct CUevent_st {
    marks own, *marks;
    int file;       // of the marks, where another process may have opened the event
    int is_remote;  // its record is another process's: no signal comes
    int references;
    int64_t time_ns;
    stream *stream;  // of the last record
};

static cudaEvent_t new_event(void) {
    cudaEvent_t e = calloc(1, sizeof *e);
    e->marks = &e->own;
    e->references = 1;
    return e;
}

static void release(cudaEvent_t e) {  // under the lock
    if (--e->references) return;
    if (e->marks != &e->own) munmap(e->marks, sizeof *e->marks);
    if (e->file) close(e->file);
    free(e);
}

typedef struct { op base; cudaEvent_t event; long number; } place;

static void pass(op *o, stream *s) {
    place *p = (place *)o;
    pthread_mutex_lock(&queues);
    p->event->time_ns = now_ns();
    if (p->event->marks->passed < p->number) p->event->marks->passed = p->number;
    release(p->event);
    pthread_mutex_unlock(&queues);
}

static void pause_for_another_process(void) {  // under the lock
    pthread_mutex_unlock(&queues);
    usleep(500);
    pthread_mutex_lock(&queues);
}

static void await_place(op *o, stream *s) {
    place *p = (place *)o;
    pthread_mutex_lock(&queues);
    while (p->event->marks->passed < p->number) {
        if (p->event->is_remote) pause_for_another_process();
        else wait_behind(s, p->event->stream);
    }
    release(p->event);
    pthread_mutex_unlock(&queues);
}

static place *new_place(cudaEvent_t e, long number, void (*run)(op *, stream *)) {
    place *p = new_op(sizeof *p, run);
    p->event = e;
    p->number = number;
    e->references++;
    return p;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = new_event(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    if (!e) return cudaErrorInvalidResourceHandle;
    pthread_mutex_lock(&queues);
    release(e);
    pthread_mutex_unlock(&queues);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t handle) {
    if (!e) return cudaErrorInvalidResourceHandle;
    stream *s = stream_of(handle);
    pthread_mutex_lock(&queues);
    e->stream = s;
    place *p = new_place(e, ++e->marks->recorded, pass);
    pthread_mutex_unlock(&queues);
    return enqueue(s, &p->base);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t e, unsigned flags) {
    stream *s = stream_of(handle);
    pthread_mutex_lock(&queues);
    long number = e->marks->recorded;
    place *p = e->marks->passed < number ? new_place(e, number, await_place) : 0;
    pthread_mutex_unlock(&queues);
    return p ? enqueue(s, &p->base) : cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e) {
    return e->marks->passed < e->marks->recorded ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    int64_t start = now_ns();
    pthread_mutex_lock(&queues);
    long number = e->marks->recorded;
    int must_wait = e->marks->passed < number;
    wait_record *shown = must_wait ? begin_wait(WAIT_EVENT, e->stream ? e->stream->id : -1) : 0;
    e->references++;
    while (e->marks->passed < number) {
        if (e->is_remote) pause_for_another_process();
        else pthread_cond_wait(&queues_changed, &queues);
    }
    release(e);
    pthread_mutex_unlock(&queues);
    end_wait(shown);
    count_wait(WAIT_EVENT, now_ns() - start);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from->marks->recorded || !to->marks->recorded) return cudaErrorInvalidResourceHandle;
    if (cudaEventQuery(from) || cudaEventQuery(to)) return cudaErrorNotReady;
    *milliseconds = (to->time_ns - from->time_ns) / 1e6f;
    return cudaSuccess;
}

// Between processes: the marks move into a file without a name, which others open through /proc.
typedef struct { pid_t pid; int file; } shared_marks;

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t e) {
    pthread_mutex_lock(&queues);
    if (!e->file) {
        e->file = memfd_create("null_gpu_event", MFD_CLOEXEC);
        if (e->file < 0 || ftruncate(e->file, sizeof *e->marks)) abort();
        marks *moved = mmap(0, sizeof *e->marks, PROT_READ | PROT_WRITE, MAP_SHARED, e->file, 0);
        if (moved == MAP_FAILED) abort();
        moved->recorded = e->marks->recorded;
        moved->passed = e->marks->passed;
        e->marks = moved;
    }
    memset(handle, 0, sizeof *handle);
    shared_marks shared = {getpid(), e->file};
    memcpy(handle, &shared, sizeof shared);
    pthread_mutex_unlock(&queues);
    return cudaSuccess;
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle) {
    shared_marks shared;
    char path[64];
    memcpy(&shared, &handle, sizeof shared);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", shared.pid, shared.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return cudaErrorMapBufferObjectFailed;
    marks *opened = mmap(0, sizeof *opened, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (opened == MAP_FAILED) return cudaErrorMapBufferObjectFailed;
    *event = new_event();
    (*event)->marks = opened;
    (*event)->is_remote = 1;
    return cudaSuccess;
}
