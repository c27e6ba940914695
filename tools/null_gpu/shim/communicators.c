// Communicators of the null GPU's NCCL: made by all ranks together, split, aborted, destroyed.
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include "communicators.h"
#include "counters.h"
#include "memory.h"

void board_changed(board *shared) {
    shared->turn++;
    syscall(SYS_futex, &shared->turn, FUTEX_WAKE, INT_MAX, 0, 0, 0);
}

void await_board(board *shared, uint32_t seen) {
    struct timespec pause = {0, LOOK_MS * 1000000l};
    syscall(SYS_futex, &shared->turn, FUTEX_WAIT, seen, &pause, 0, 0);
}

ncclResult_t refuse(ncclComm_t c, const char *what) {
    c->error = ncclInvalidUsage;
    fprintf(stderr, "null GPU: rank %d of %d: %s\n", c->rank, c->size, what);
    if (!c->shared->is_refused) {
        c->shared->is_refused = 1;
        board_changed(c->shared);
    }
    return ncclInvalidUsage;
}

int has_ended(ncclComm_t c, int rank) {
    member *m = &c->shared->members[rank];
    return m->pid && birth_of(m->pid) != m->birth;
}

int fetch(ncclComm_t c, int rank, const void *theirs, void *mine, size_t size) {
    member *m = &c->shared->members[rank];
    if (m->pid == getpid()) {
        memmove(mine, theirs, size);
        return 1;
    }
    for (size_t done = 0; done < size;) {
        struct iovec to = {(char *)mine + done, size - done}, from = {(char *)theirs + done, size - done};
        ssize_t read = process_vm_readv(m->pid, &to, 1, &from, 1, 0);
        if (read <= 0) return 0;
        done += read;
    }
    return 1;
}

static board *open_board(uint64_t id, int size, char *path, size_t path_size, int *is_memory) {
    char suffix[64];
    snprintf(suffix, sizeof suffix, "%016lx-%d", (unsigned long)id, size);
    *is_memory = !beside_segment(path, path_size, suffix);
    if (*is_memory) snprintf(path, path_size, "/null_gpu-%s", suffix);
    int file = *is_memory ? shm_open(path, O_CREAT | O_RDWR, 0600) : open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(board))) return 0;
    board *made = mmap(0, sizeof(board), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return made == MAP_FAILED ? 0 : made;
}

// Until all ranks have come, without a limit: only one that came and ended cannot be waited for.
static ncclResult_t await_members(ncclComm_t c) {
    while (1) {
        uint32_t seen = c->shared->turn;
        if (c->aborted) return ncclInternalError;
        if (c->shared->arrived >= c->size) return ncclSuccess;
        for (int rank = 0; rank < c->size; rank++)
            if (rank != c->rank && has_ended(c, rank) && c->shared->arrived < c->size) return ncclRemoteError;
        await_board(c->shared, seen);
    }
}

static ncclResult_t meet(ncclComm_t c) {
    char path[4096];
    int is_memory;
    board *shared = c->shared = open_board(c->id, c->size, path, sizeof path, &is_memory);
    if (!shared) return ncclSystemError;
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);  // lets processes that are no parents read this one's memory
    member *own = &shared->members[c->rank];
    own->gpu = c->gpu;
    own->birth = birth_of(getpid());
    own->pid = getpid();
    shared->arrived++;
    board_changed(shared);
    wait_record *shown = begin_wait(WAIT_CREATION, -1);
    if (shown) shown->comm = c->id, shown->rank = c->rank;
    ncclResult_t error = await_members(c);
    end_wait(shown);
    if (!c->rank && !error) is_memory ? shm_unlink(path) : unlink(path);
    for (int a = 0; a < c->size && !error; a++)
        for (int b = 0; b < a && !error; b++)
            if (shared->members[a].gpu == shared->members[b].gpu)
                error = refuse(c, "another rank has the same GPU, which NCCL refuses");
    if (!error && !null_gpu_charge(c->gpu, setting("NULL_GPU_NCCL_BYTES", 128l << 20))) error = ncclUnhandledCudaError;
    else if (!error) c->charged = setting("NULL_GPU_NCCL_BYTES", 128l << 20);
    if (!error && (c->shown = new_member_record())) *c->shown = (member_record){c->id, c->rank, c->size};
    return error;
}

static void *meet_apart(void *argument) {
    ncclComm_t c = argument;
    ncclResult_t error = meet(c);
    if (error) c->error = error;
    c->state = error;
    release_communicator(c);
    return 0;
}

// Whether NCCL takes it, which reads the fields that its version had (init.cc, parseCommConfig).
static int is_config(ncclConfig_t *given) {
    ncclConfig_t c = {0};
    memcpy(&c, given, given->size < sizeof c ? given->size : sizeof c);
    int limits[] = {c.minCTAs, c.maxCTAs, c.nvlsCTAs, c.nChannelsPerNetPeer};
    const unsigned since[] = {21700, 21700, 22700, 22800};
    if (c.magic != NCCL_API_MAGIC || (c.blocking != NCCL_CONFIG_UNDEF_INT && c.blocking >> 1)) return 0;
    for (int i = 0; i < 4; i++) {
        if (c.version < since[i]) limits[i] = NCCL_CONFIG_UNDEF_INT;
        if (limits[i] != NCCL_CONFIG_UNDEF_INT && limits[i] <= 0) return 0;
    }
    return limits[0] <= limits[1];
}

static ncclResult_t make(ncclComm_t *made, int size, uint64_t id, int rank, ncclConfig_t *config) {
    if (size > RANKS || size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
    if (config && !is_config(config)) return ncclInvalidArgument;
    ncclComm_t c = *made = calloc(1, sizeof *c);
    c->count = count_communicator(size);
    c->size = size;
    c->rank = rank;
    c->id = id;
    c->device = current_device();
    c->gpu = current_gpu();
    c->references = 1;
    if (!config || config->blocking) return meet(c);  // INT_MIN: not set
    pthread_t thread;
    c->references++;
    c->state = ncclInProgress;
    if (pthread_create(&thread, 0, meet_apart, c)) abort();
    pthread_detach(thread);
    return ncclInProgress;
}

static uint64_t id_of(const ncclUniqueId *id) {
    uint64_t number;
    memcpy(&number, id->internal, sizeof number);
    return number;
}

ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 0, sizeof *id);
    return getentropy(id->internal, 8) ? ncclSystemError : ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return make(comm, size, id_of(&id), rank, 0);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    return make(comm, size, id_of(&id), rank, config);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int size, int rank, int ids, ncclUniqueId *id,
                                      ncclConfig_t *config) {
    return make(comm, size, id_of(id), rank, config);
}

// All ranks publish `counters[rank]` and go on when all have reached that number.
static ncclResult_t meet_again(ncclComm_t c, _Atomic long *counters, long number) {
    counters[c->rank] = number;
    board_changed(c->shared);
    wait_record *shown = begin_wait(WAIT_CREATION, -1);
    if (shown) shown->comm = c->id, shown->rank = c->rank;
    ncclResult_t error = ncclSuccess;
    for (int rank = 0; rank < c->size && !error;) {
        uint32_t seen = c->shared->turn;
        if (counters[rank] >= number) rank++;
        else if (c->aborted) error = ncclInternalError;
        else if (has_ended(c, rank) && counters[rank] < number) error = ncclRemoteError;
        else await_board(c->shared, seen);
    }
    end_wait(shown);
    return error;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *made, ncclConfig_t *config) {
    split *splits = comm->shared->splits;
    long number = ++comm->num_splits;
    splits[comm->rank] = (split){color, key};
    *made = 0;
    ncclResult_t error = meet_again(comm, comm->shared->splitting, number);
    int size = 0, rank = 0;
    for (int other = 0; other < comm->size && !error; other++) {
        if (splits[other].color != color) continue;
        size++;
        rank += splits[other].key < key || (splits[other].key == key && other < comm->rank);
    }
    if (!error) error = meet_again(comm, comm->shared->split_read, number);
    uint64_t id = (comm->id ^ ((uint64_t)number << 16 | (uint64_t)(color + 1))) * 0x9e3779b97f4a7c15ul;
    return error || color == NCCL_SPLIT_NOCOLOR ? error : make(made, size, id, rank, config);
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *size) { *size = comm->size; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) { *rank = comm->rank; return ncclSuccess; }
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) { *device = comm->device; return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    if (!comm) return ncclInvalidArgument;
    if (comm->shared && comm->shared->is_refused) comm->error = ncclInvalidUsage;
    *error = comm->error ? comm->error : comm->state;
    return ncclSuccess;
}

void release_communicator(ncclComm_t c) {
    if (--c->references) return;
    for (int to = 0; to < c->size; to++)
        for (int i = 0; i < MESSAGES; i++) free(c->buffers[to][i]);
    if (c->shared) munmap(c->shared, sizeof *c->shared);
    free(c);
}

static void leave(ncclComm_t c) {
    if (c->shared) {
        c->shared->members[c->rank].has_left = 1;
        board_changed(c->shared);
    }
    null_gpu_charge(c->gpu, -c->charged);
    c->charged = 0;
    if (c->shown) c->shown->size = 0;
    release_communicator(c);
}

// Calls of this rank that run end, those that are queued end when their turn comes; the peers' are not ended by it.
ncclResult_t ncclCommAbort(ncclComm_t c) {
    if (!c) return ncclSuccess;
    c->aborted = 1;
    if (c->shared) board_changed(c->shared);
    pthread_mutex_lock(&queues);
    pthread_cond_broadcast(&queues_changed);
    while (c->is_running) pthread_cond_wait(&queues_changed, &queues);
    pthread_mutex_unlock(&queues);
    leave(c);
    return ncclSuccess;
}
// Waits until the calls of this rank have ended, and what it has sent is received, which lies in this process.
ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (!c) return ncclSuccess;
    pthread_mutex_lock(&queues);
    while (c->finished < c->issued && !c->aborted) pthread_cond_wait(&queues_changed, &queues);
    pthread_mutex_unlock(&queues);
    for (int to = 0; to < c->size && c->shared;) {
        mailbox *box = &c->shared->from_to[c->rank][to];
        uint32_t seen = c->shared->turn;
        if (box->received >= box->sent || has_ended(c, to) || c->aborted) to++;
        else await_board(c->shared, seen);
    }
    leave(c);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t error) { return error ? "error of the null GPU" : "no error"; }
const char *ncclGetLastError(ncclComm_t comm) { return ""; }
ncclResult_t ncclMemAlloc(void **p, size_t size) {
    return (*p = null_gpu_allocate(size, DEVICE)) ? ncclSuccess : ncclUnhandledCudaError;
}
ncclResult_t ncclMemFree(void *p) { null_gpu_free(p); return ncclSuccess; }
