// The segment that processes on the null GPUs share (segment.h), and the bytes of each GPU.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "null_gpu.h"
#include "segment.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static process *slots, *own, alone;
static int file = -1, num_streams;
static int has_context[GPUS];

int64_t setting(const char *name, int64_t otherwise) {
    const char *value = getenv(name);
    return value && *value ? strtoll(value, 0, 10) : otherwise;
}

int64_t birth_of(int pid) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int stat = open(path, O_RDONLY | O_CLOEXEC);
    if (stat < 0) return 0;
    ssize_t size = read(stat, text, sizeof text - 1);
    close(stat);
    if (size <= 0) return 0;
    text[size] = 0;
    char *at = strrchr(text, ')'), state = 0;
    long long birth = 0;
    if (!at || sscanf(at + 1, " %c%*d%*d%*d%*d%*d%*u%*u%*u%*u%*u%*u%*u%*d%*d%*d%*d%*d%*d%lld", &state, &birth) < 2)
        return 0;
    return strchr("ZXx", state) ? 0 : birth;
}

static int is_alive(process *p) { return p->pid && birth_of(p->pid) == p->birth; }

static void lock_file(int kind) {  // the kernel unlocks it when its holder ends
    struct flock all = {.l_type = kind, .l_whence = SEEK_SET};
    while (file >= 0 && fcntl(file, F_SETLKW, &all) == -1 && errno == EINTR);
}

const char *beside_segment(char *path, size_t size, const char *suffix) {
    const char *name = getenv("NULL_GPU_SEGMENT");
    if (!name) return 0;
    snprintf(path, size, "%s.%s", name, suffix);
    return path;
}

static void open_segment(void) {
    const char *path = getenv("NULL_GPU_SEGMENT");
    if (!path) return;
    file = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, PROCESSES * sizeof *slots)) abort();
    slots = mmap(0, PROCESSES * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (slots == MAP_FAILED) abort();
}

static process *own_slot(void) {  // under the mutex
    if (own && own->pid != getpid()) own = 0, memset(has_context, 0, sizeof has_context);  // forked
    if (own) return own;
    if (!slots) open_segment();
    lock_file(F_WRLCK);
    for (int i = 0; slots && !own && i < PROCESSES; i++)
        if (!is_alive(&slots[i])) own = &slots[i];
    if (!own) own = &alone;
    memset((void *)own, 0, sizeof *own);
    own->birth = birth_of(getpid());
    own->pid = getpid();
    lock_file(F_UNLCK);
    return own;
}

process *this_process(void) {
    pthread_mutex_lock(&mutex);
    process *found = own_slot();
    pthread_mutex_unlock(&mutex);
    return found;
}

static int64_t used_by_all(int gpu) {
    int64_t used = slots ? 0 : own->bytes[gpu];
    for (int i = 0; slots && i < PROCESSES; i++)
        if (&slots[i] == own || (slots[i].bytes[gpu] && is_alive(&slots[i]))) used += slots[i].bytes[gpu];
    return used;
}

static int add(int gpu, int64_t bytes) {
    if (bytes > 0 && used_by_all(gpu) + bytes > gpu_bytes()) return 0;
    own->bytes[gpu] += bytes;
    if (own->bytes[gpu] > own->peak[gpu]) own->peak[gpu] = own->bytes[gpu];
    return 1;
}

// A process that first uses a GPU makes a context there, which takes memory as well.
static void make_context(int gpu) {
    if (has_context[gpu]) return;
    has_context[gpu] = 1;
    if (!add(gpu, setting("NULL_GPU_CONTEXT_BYTES", 512l << 20))) has_context[gpu] = 0;
}

int null_gpu_charge(int gpu, int64_t bytes) {
    pthread_mutex_lock(&mutex);
    own_slot();
    lock_file(F_WRLCK);
    make_context(gpu);
    int fits = has_context[gpu] && add(gpu, bytes);
    lock_file(F_UNLCK);
    pthread_mutex_unlock(&mutex);
    return fits;
}

// Pinned memory is of the host, whose bytes all processes share.
int charge_pinned(int64_t bytes) {
    int64_t limit = setting("NULL_GPU_PINNED_BYTES", INT64_MAX), used = bytes;
    pthread_mutex_lock(&mutex);
    process *p = own_slot();
    lock_file(F_WRLCK);
    if (!slots) used += p->pinned;
    for (int i = 0; slots && i < PROCESSES; i++)
        if (&slots[i] == p || (slots[i].pinned && is_alive(&slots[i]))) used += slots[i].pinned;
    int fits = bytes <= 0 || used <= limit;
    if (fits) p->pinned += bytes;
    if (p->pinned > p->pinned_peak) p->pinned_peak = p->pinned;
    lock_file(F_UNLCK);
    pthread_mutex_unlock(&mutex);
    return fits;
}

void memory_info(int gpu, size_t *left, size_t *total) {
    pthread_mutex_lock(&mutex);
    own_slot();
    lock_file(F_WRLCK);
    make_context(gpu);
    int64_t used = used_by_all(gpu);
    lock_file(F_UNLCK);
    pthread_mutex_unlock(&mutex);
    *total = gpu_bytes();
    *left = used < (int64_t)*total ? *total - used : 0;
}

stream_record *new_stream_record(int *id, int gpu) {
    static stream_record beyond;  // of streams that are too many to be shown
    pthread_mutex_lock(&mutex);
    process *p = own_slot();
    *id = num_streams < STREAMS ? num_streams++ : -1;
    stream_record *made = *id < 0 ? &beyond : &p->streams[*id];
    *made = (stream_record){.gpu = gpu};
    pthread_mutex_unlock(&mutex);
    return made;
}

call_record *new_call_record(void) {
    static int from;  // where the search begins: behind the last one
    pthread_mutex_lock(&mutex);
    process *p = own_slot();
    call_record *made = 0;
    for (int i = 0; i < CALLS && !made; i++) {
        call_record *at = &p->calls[(from + i) % CALLS];
        if (at->state == UNUSED) made = at, from = (from + i + 1) % CALLS;
    }
    if (made) made->state = QUEUED;
    pthread_mutex_unlock(&mutex);
    return made;
}

member_record *new_member_record(void) {
    pthread_mutex_lock(&mutex);
    process *p = own_slot();
    member_record *made = 0;
    for (int i = 0; i < MEMBERS && !made; i++)
        if (!p->members[i].size) made = &p->members[i];
    if (made) made->size = -1;
    pthread_mutex_unlock(&mutex);
    return made;
}

wait_record *begin_wait(enum wait kind, int stream) {
    pthread_mutex_lock(&mutex);
    process *p = own_slot();
    wait_record *made = 0;
    for (int i = 0; i < WAITS && !made; i++)
        if (p->waits[i].kind == NO_WAIT) made = &p->waits[i];
    if (made) *made = (wait_record){.kind = kind, .stream = stream, .thread = gettid()};
    pthread_mutex_unlock(&mutex);
    return made;
}

void end_wait(wait_record *record) {
    if (record) record->kind = NO_WAIT;
}
