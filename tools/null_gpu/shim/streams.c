// Streams of the null GPU: queues, their threads, CUDA's rules of the default stream, and waits of the host.
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include "counters.h"
#include "null_gpu.h"
#include "streams.h"

pthread_mutex_t queues = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t queues_changed = PTHREAD_COND_INITIALIZER;

static stream *all, *legacy[DEVICES];
static __thread stream *per_thread[DEVICES];
static long tickets;
static pid_t owner;  // a forked process has no threads for the queues, and CUDA refuses it too

static __thread int device_of_thread;
int current_device(void) { return device_of_thread; }
int current_gpu(void) {
    int gpu = gpu_of(device_of_thread);
    return gpu < 0 ? 0 : gpu;
}
cudaError_t cudaGetDevice(int *device) { *device = device_of_thread; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_gpus() || device >= DEVICES) return cudaErrorInvalidDevice;
    device_of_thread = device;
    return cudaSuccess;
}

static stream *make(int is_blocking) {
    stream *s = calloc(1, sizeof *s);
    s->device = current_device();
    s->gpu = current_gpu();
    s->is_blocking = is_blocking;
    pthread_cond_init(&s->filled, 0);
    pthread_mutex_lock(&queues);
    s->record = new_stream_record(&s->id, s->gpu);
    s->next = all;
    all = s;
    pthread_mutex_unlock(&queues);
    return s;
}

stream *stream_of(cudaStream_t handle) {
    if (handle == cudaStreamPerThread) {
        stream **own = &per_thread[current_device()];
        return *own ? *own : (*own = make(1));
    }
    if (handle && handle != cudaStreamLegacy) return handle;
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&making);
    stream **found = &legacy[current_device()];
    if (!*found) *found = make(1);
    pthread_mutex_unlock(&making);
    return *found;
}

// The default stream waits for what was queued before on all other blocking streams of its device, and they for it.
static stream *default_conflict(stream *s, long ticket) {
    stream *first = legacy[s->device];
    if (!s->is_blocking || !first) return 0;
    if (s != first) return first->first && first->first->ticket < ticket ? first : 0;
    for (stream *other = all; other; other = other->next)
        if (other != s && other->device == s->device && other->is_blocking && other->first &&
            other->first->ticket < ticket)
            return other;
    return 0;
}

// NULL_GPU_QUEUES: so many queues of the hardware, which streams share. What cannot start yet holds up what was queued
// later on the other streams of its queue; what runs does not.
static stream *queue_conflict(stream *s, long ticket) {
    int number = setting("NULL_GPU_QUEUES", 0);
    for (stream *other = number ? all : 0; other; other = other->next) {
        if (other == s || other->device != s->device || other->id % number != s->id % number || !other->first) continue;
        op *waiting = other->has_started ? other->first->next : other->first;
        if (waiting && waiting->ticket < ticket) return other;
    }
    return 0;
}

static stream *conflict(stream *s, long ticket) {
    stream *found = default_conflict(s, ticket);
    return found ? found : queue_conflict(s, ticket);
}

void wait_behind(stream *s, stream *other) {
    s->record->behind = other ? other->id : -1;
    s->record->state = BEHIND_STREAM;
    s->has_started = 0;
    pthread_cond_wait(&queues_changed, &queues);
    s->record->state = RUNNING;
    s->has_started = 1;
}

static void *serve(void *argument) {
    stream *s = argument, *other;
    pthread_mutex_lock(&queues);
    while (1) {
        while (!s->first && !s->is_closed) pthread_cond_wait(&s->filled, &queues);
        if (!s->first) break;
        op *turn = s->first;
        s->record->state = RUNNING;
        while ((other = conflict(s, turn->ticket))) wait_behind(s, other);
        s->has_started = 1;
        pthread_cond_broadcast(&queues_changed);
        pthread_mutex_unlock(&queues);
        turn->run(turn, s);
        pthread_mutex_lock(&queues);
        s->has_started = 0;
        s->first = turn->next;
        if (!s->first) s->last = 0;
        s->finished++;
        s->record->state = s->first ? RUNNING : IDLE;
        free(turn);
        pthread_cond_broadcast(&queues_changed);
    }
    s->has_thread = 0;
    pthread_mutex_unlock(&queues);
    return 0;
}

static void start_thread(stream *s) {
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are the host's
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    if (pthread_create(&thread, &attributes, serve, s)) abort();
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    s->has_thread = 1;
}

void *new_op(size_t size, void (*run)(op *, stream *)) {
    op *made = calloc(1, size);
    made->run = run;
    return made;
}

void enqueue_locked(stream *s, op *made) {
    made->ticket = ++tickets;
    if (s->last) s->last->next = made;
    else s->first = made;
    s->last = made;
    s->queued++;
    if (!s->has_thread) start_thread(s);
    pthread_cond_signal(&s->filled);
}

cudaError_t enqueue(stream *s, op *made) {
    pthread_mutex_lock(&queues);
    if (!owner) owner = getpid();
    cudaError_t error = owner != getpid() ? cudaErrorInitializationError
                      : s->is_closed ? cudaErrorInvalidResourceHandle : cudaSuccess;
    if (!error) enqueue_locked(s, made);
    pthread_mutex_unlock(&queues);
    if (error) free(made);
    return error;
}

int is_idle(stream *s) {
    pthread_mutex_lock(&queues);
    int idle = !s->first && !conflict(s, tickets + 1);
    pthread_mutex_unlock(&queues);
    return idle;
}

static void nothing(op *o, stream *s) {}

static void await_finished(stream *s, wait_record *shown) {  // what is queued by now
    pthread_mutex_lock(&queues);
    long last = s->queued;
    if (shown) shown->stream = s->id;
    while (s->finished < last) pthread_cond_wait(&queues_changed, &queues);
    pthread_mutex_unlock(&queues);
}

cudaError_t wait_for_stream(stream *s, enum wait kind) {
    int64_t start = now_ns();
    cudaError_t error = cudaSuccess;
    if (!is_idle(s)) {
        wait_record *shown = begin_wait(kind, s->id);
        // A marker, as the default stream has to wait for the others, and an operator as whatever is queued.
        if (s == legacy[s->device] || kind == WAIT_OPERATOR) error = enqueue(s, new_op(sizeof(op), nothing));
        if (!error) await_finished(s, shown);
        end_wait(shown);
    }
    count_wait(kind, now_ns() - start);
    return error;
}

cudaError_t wait_for_device(int device, enum wait kind) {
    int64_t start = now_ns();
    wait_record *shown = begin_wait(kind, -1);
    pthread_mutex_lock(&queues);
    stream *first = all;
    pthread_mutex_unlock(&queues);
    for (stream *s = first; s; s = s->next)
        if (s->device == device) await_finished(s, shown);
    end_wait(shown);
    count_wait(kind, now_ns() - start);
    return cudaSuccess;
}

// The API.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    *s = make(!(flags & cudaStreamNonBlocking));
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    return cudaStreamCreateWithPriority(s, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {  // what is queued still runs
    if (!s || s == cudaStreamLegacy || s == cudaStreamPerThread) return cudaErrorInvalidResourceHandle;
    pthread_mutex_lock(&queues);
    s->is_closed = 1;
    pthread_cond_signal(&s->filled);
    pthread_mutex_unlock(&queues);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    stream *s = stream_of(handle);
    pthread_mutex_lock(&queues);
    int is_ready = !s->first && (s != legacy[s->device] || !default_conflict(s, tickets + 1));
    pthread_mutex_unlock(&queues);
    return is_ready ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for_stream(stream_of(s), WAIT_STREAM); }
cudaError_t cudaDeviceSynchronize(void) { return wait_for_device(current_device(), WAIT_DEVICE); }

typedef struct { op base; cudaHostFn_t function; cudaStreamCallback_t callback; cudaStream_t handle; void *argument; } host;
static void call_host(op *o, stream *s) {
    host *h = (host *)o;
    if (h->function) h->function(h->argument);
    else h->callback(h->handle, cudaSuccess, h->argument);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *argument) {
    host *h = new_op(sizeof *h, call_host);
    h->function = function;
    h->argument = argument;
    return enqueue(stream_of(s), &h->base);
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t callback, void *argument, unsigned flags) {
    host *h = new_op(sizeof *h, call_host);
    h->callback = callback;
    h->handle = s;
    h->argument = argument;
    return enqueue(stream_of(s), &h->base);
}

// A kernel takes its turn and does nothing; where nothing is before it, its turn is at once.
static _Atomic long launches;
long null_gpu_launches(void) { return launches; }
cudaError_t null_gpu_launch(void *handle) {
    stream *s = stream_of(handle);
    launches++;
    return is_idle(s) ? cudaSuccess : enqueue(s, new_op(sizeof(op), nothing));
}

// What an operator on the host does first: it waits for what is queued on its device's stream.
int null_gpu_drain(int device, void *handle) {
    int before = device_of_thread;
    device_of_thread = device;
    stream *s = stream_of(handle);
    cudaError_t error = is_idle(s) ? cudaSuccess : wait_for_stream(s, WAIT_OPERATOR);
    device_of_thread = before;
    return error;
}
// What such an operator does besides where CUDA's would copy a number to the host: it waits for the stream.
int null_gpu_read(int device, void *handle) {
    int before = device_of_thread;
    device_of_thread = device;
    cudaError_t error = wait_for_stream(stream_of(handle), WAIT_STREAM);
    device_of_thread = before;
    return error;
}
