// NCCL of the null GPU, preloaded. The ranks of a communicator are processes of one machine, and each reads the others'
// memory. A collective is done when its call returns; a send is buffered, and ends at once.
#define _GNU_SOURCE
#include <nccl.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RANKS 16     // of a communicator, at most
#define MESSAGES 64  // sent and not yet received, between two ranks
#define SECONDS 240  // a wait for another rank ends after this

void *null_gpu_allocate(size_t size, int kind);
void null_gpu_free(void *start);
int null_gpu_current(void);

// What the ranks of a communicator share.
typedef struct { const void *start; size_t size; } message;
typedef struct { _Atomic long sent, received; message messages[MESSAGES]; } mailbox;
enum kind { BARRIER, SPLIT, ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, GATHER, SCATTER };
typedef struct { enum kind kind; size_t count; int type, op, root, color, key; const void *from; } call;
typedef struct {
    _Atomic long arrived;
    volatile int is_broken;  // a rank has refused a call: no rank waits any more
    pid_t pids[RANKS];
    int gpus[RANKS];
    call calls[RANKS];
    mailbox from_to[RANKS][RANKS];
} board;

struct ncclComm {
    board *shared;
    int size, rank;
    long barriers, splits;
    uint64_t id;
    volatile int aborted;
};

static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // of ncclInt8 … ncclFloat8e5m2

static ncclResult_t refuse(ncclComm_t c, const char *what) {
    c->shared->is_broken = 1;
    fprintf(stderr, "null GPU: rank %d of %d: %s\n", c->rank, c->size, what);
    return ncclInvalidUsage;
}

static ncclResult_t await(ncclComm_t c, _Atomic long *counter, long least) {
    time_t end = time(0) + SECONDS;
    for (long i = 0; atomic_load(counter) < least; i++) {
        if (c->aborted || c->shared->is_broken) return ncclInternalError;
        if (time(0) > end) return refuse(c, "another rank did not come");
        if (i < 100) sched_yield();
        else usleep(200);
    }
    return ncclSuccess;
}

static ncclResult_t barrier(ncclComm_t c) {
    atomic_fetch_add(&c->shared->arrived, 1);
    return await(c, &c->shared->arrived, ++c->barriers * c->size);
}

static ncclResult_t fetch(ncclComm_t c, int rank, const void *theirs, void *mine, size_t size) {
    if (rank == c->rank) memmove(mine, theirs, size);
    else
        for (size_t done = 0; done < size;) {
            struct iovec to = {(char *)mine + done, size - done}, from = {(char *)theirs + done, size - done};
            ssize_t read = process_vm_readv(c->shared->pids[rank], &to, 1, &from, 1, 0);
            if (read <= 0) return refuse(c, "another rank's memory cannot be read");
            done += read;
        }
    return ncclSuccess;
}

// Communicators.
static ncclResult_t join(ncclComm_t *made, int size, uint64_t id, int rank) {
    char name[64];
    if (size > RANKS) return ncclInvalidArgument;
    ncclComm_t c = *made = calloc(1, sizeof *c);
    *c = (struct ncclComm){.size = size, .rank = rank, .id = id};
    snprintf(name, sizeof name, "/null_gpu-%016lx-%d", (unsigned long)id, size);
    int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(board))) return ncclSystemError;
    c->shared = mmap(0, sizeof(board), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (c->shared == MAP_FAILED) return ncclSystemError;
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);  // lets processes that are no parents read this one's memory
    c->shared->pids[rank] = getpid();
    c->shared->gpus[rank] = null_gpu_current();
    ncclResult_t error = barrier(c);
    if (!rank) shm_unlink(name);
    for (int other = 0; other < size && !error; other++)
        if (other != rank && c->shared->gpus[other] == c->shared->gpus[rank])
            error = refuse(c, "another rank has the same GPU, which NCCL refuses");
    return error;
}

static uint64_t id_of(const ncclUniqueId *id) { return *(uint64_t *)id->internal; }

ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return 0; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 0, sizeof *id);
    return getentropy(id->internal, 8) ? ncclSystemError : ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return join(comm, size, id_of(&id), rank);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    return join(comm, size, id_of(&id), rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int size, int rank, int ids, ncclUniqueId *id,
                                      ncclConfig_t *config) {
    return join(comm, size, id_of(id), rank);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *made, ncclConfig_t *config) {
    call *calls = comm->shared->calls;
    calls[comm->rank] = (call){SPLIT, .color = color, .key = key};
    ncclResult_t error = barrier(comm);
    int size = 0, rank = 0;
    for (int other = 0; other < comm->size; other++) {
        if (calls[other].color != color) continue;
        size++;
        rank += calls[other].key < key || (calls[other].key == key && other < comm->rank);
    }
    if (!error) error = barrier(comm);
    *made = 0;
    uint64_t id = (comm->id ^ (++comm->splits << 16 | (uint64_t)(color + 1))) * 0x9e3779b97f4a7c15ul;
    return error || color == NCCL_SPLIT_NOCOLOR ? error : join(made, size, id, rank);
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int *size) { *size = comm->size; return 0; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) { *rank = comm->rank; return 0; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) { *error = ncclSuccess; return 0; }
ncclResult_t ncclCommAbort(ncclComm_t comm) { comm->aborted = 1; return 0; }  // others may still wait in it
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    ncclResult_t error = ncclSuccess;
    for (int to = 0; to < comm->size && !error; to++) {  // messages are in this process's memory
        mailbox *box = &comm->shared->from_to[comm->rank][to];
        error = await(comm, &box->received, atomic_load(&box->sent));
    }
    return error;
}
const char *ncclGetErrorString(ncclResult_t error) { return error ? "error of the null GPU" : "no error"; }
const char *ncclGetLastError(ncclComm_t comm) { return ""; }
ncclResult_t ncclMemAlloc(void **p, size_t size) { return (*p = null_gpu_allocate(size, 2)) ? 0 : ncclSystemError; }
ncclResult_t ncclMemFree(void *p) { null_gpu_free(p); return 0; }

// Numbers. 64 bits of a mantissa hold every integer type.
static long double number(const void *at, size_t i, int type) {
    switch (type) {
    case ncclInt8: return ((int8_t *)at)[i];
    case ncclUint8: return ((uint8_t *)at)[i];
    case ncclInt32: return ((int32_t *)at)[i];
    case ncclUint32: return ((uint32_t *)at)[i];
    case ncclInt64: return ((int64_t *)at)[i];
    case ncclUint64: return ((uint64_t *)at)[i];
    case ncclFloat16: return (float)((_Float16 *)at)[i];
    case ncclFloat32: return ((float *)at)[i];
    case ncclFloat64: return ((double *)at)[i];
    }
    uint32_t bits = (uint32_t)((uint16_t *)at)[i] << 16;  // bfloat16
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void store(void *at, size_t i, int type, long double value) {
    switch (type) {
    case ncclInt8: ((int8_t *)at)[i] = value; return;
    case ncclUint8: ((uint8_t *)at)[i] = value; return;
    case ncclInt32: ((int32_t *)at)[i] = value; return;
    case ncclUint32: ((uint32_t *)at)[i] = value; return;
    case ncclInt64: ((int64_t *)at)[i] = value; return;
    case ncclUint64: ((uint64_t *)at)[i] = value; return;
    case ncclFloat16: ((_Float16 *)at)[i] = (float)value; return;
    case ncclFloat32: ((float *)at)[i] = value; return;
    case ncclFloat64: ((double *)at)[i] = value; return;
    }
    float rounded = value;
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    ((uint16_t *)at)[i] = rounded == rounded ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

static ncclResult_t reduced(ncclComm_t c, size_t offset, void *to) {
    call *calls = c->shared->calls, mine = calls[c->rank];
    if (mine.op > ncclAvg || mine.type > ncclBfloat16) return refuse(c, "this reduction is not implemented");
    size_t bytes = mine.count * sizes[mine.type];
    char *theirs = malloc(bytes + 1);
    long double *sum = malloc(mine.count * sizeof *sum + 1);
    ncclResult_t error = ncclSuccess;
    for (int rank = 0; rank < c->size && !error; rank++) {
        error = fetch(c, rank, (char *)calls[rank].from + offset, theirs, bytes);
        for (size_t i = 0; i < mine.count && !error; i++) {
            long double value = number(theirs, i, mine.type);
            if (!rank) sum[i] = value;
            else if (mine.op == ncclProd) sum[i] *= value;
            else if (mine.op == ncclMax) sum[i] = value > sum[i] || value != value ? value : sum[i];
            else if (mine.op == ncclMin) sum[i] = value < sum[i] || value != value ? value : sum[i];
            else sum[i] += value;
        }
    }
    for (size_t i = 0; i < mine.count && !error; i++)
        store(to, i, mine.type, mine.op == ncclAvg ? sum[i] / c->size : sum[i]);
    free(theirs);
    free(sum);
    return error;
}

// A collective: every rank publishes its call, reads what it needs of the others', and leaves when all have read.
static ncclResult_t collective(ncclComm_t c, call mine, void *to) {
    size_t each = mine.count * sizes[mine.type];
    int gathers = mine.kind == ALL_GATHER || mine.kind == ALL_TO_ALL || mine.kind == GATHER;
    int receives = (mine.kind != REDUCE && mine.kind != GATHER) || mine.root == c->rank;
    call *calls = c->shared->calls;
    calls[c->rank] = mine;
    ncclResult_t error = barrier(c);
    if (error) return error;
    call first = calls[0];
    if (mine.kind != first.kind || mine.count != first.count || mine.type != first.type || mine.op != first.op ||
        mine.root != first.root)
        return refuse(c, "another collective than rank 0's, of another size, type or root");
    size_t bytes = gathers ? each * c->size : each;
    char *made = malloc(bytes + 1);
    if (!receives) bytes = 0;
    else if (gathers)
        for (int rank = 0; rank < c->size && !error; rank++) {
            size_t offset = mine.kind == ALL_TO_ALL ? c->rank * each : 0;
            error = fetch(c, rank, (char *)calls[rank].from + offset, made + rank * each, each);
        }
    else if (mine.kind == BROADCAST) error = fetch(c, mine.root, calls[mine.root].from, made, each);
    else if (mine.kind == SCATTER)
        error = fetch(c, mine.root, (char *)calls[mine.root].from + c->rank * each, made, each);
    else error = reduced(c, mine.kind == REDUCE_SCATTER ? c->rank * each : 0, made);
    if (!error) error = barrier(c);
    if (!error && bytes) memcpy(to, made, bytes);
    free(made);
    return error;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s) {
    return collective(c, (call){ALL_REDUCE, n, t, op, .from = from}, to);
}
ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, int root,
                        ncclComm_t c, cudaStream_t s) {
    return collective(c, (call){REDUCE, n, t, op, root, .from = from}, to);
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t s) {
    return collective(c, (call){BROADCAST, n, t, .root = root, .from = from}, to);
}
ncclResult_t ncclBcast(void *at, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
    return ncclBroadcast(at, at, n, t, root, c, s);
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
    return collective(c, (call){ALL_GATHER, n, t, .from = from}, to);
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                               cudaStream_t s) {
    return collective(c, (call){REDUCE_SCATTER, n, t, op, .from = from}, to);
}
ncclResult_t ncclAlltoAll(const void *from, void *to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
    return collective(c, (call){ALL_TO_ALL, n, t, .from = from}, to);
}
ncclResult_t ncclGather(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                        cudaStream_t s) {
    return collective(c, (call){GATHER, n, t, .root = root, .from = from}, to);
}
ncclResult_t ncclScatter(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                         cudaStream_t s) {
    return collective(c, (call){SCATTER, n, t, .root = root, .from = from}, to);
}

// From one rank to another. What a group receives, it receives at its end, when it has sent everything.
typedef struct { void *to; size_t size; int peer; ncclComm_t comm; } receipt;
static __thread receipt *waiting;
static __thread int depth, num_waiting;

ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    mailbox *box = &c->shared->from_to[c->rank][peer];
    long number = atomic_load(&box->sent);
    message *place = &box->messages[number % MESSAGES];
    ncclResult_t error = await(c, &box->received, number + 1 - MESSAGES);
    if (error) return error;
    free((void *)place->start);  // of the message that was received from here before
    void *copy = malloc(n * sizes[t] + 1);
    memcpy(copy, from, n * sizes[t]);
    *place = (message){copy, n * sizes[t]};
    atomic_store(&box->sent, number + 1);
    return ncclSuccess;
}

static ncclResult_t receive(receipt wanted) {
    ncclComm_t c = wanted.comm;
    mailbox *box = &c->shared->from_to[wanted.peer][c->rank];
    long number = atomic_load(&box->received);
    ncclResult_t error = await(c, &box->sent, number + 1);
    if (error) return error;
    message *found = &box->messages[number % MESSAGES];
    if (found->size != wanted.size) return refuse(c, "a message of another size than what is received");
    error = fetch(c, wanted.peer, found->start, wanted.to, wanted.size);
    atomic_store(&box->received, number + 1);
    return error;
}

ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    receipt wanted = {to, n * sizes[t], peer, c};
    if (!depth) return receive(wanted);
    waiting = realloc(waiting, (num_waiting + 1) * sizeof *waiting);
    waiting[num_waiting++] = wanted;
    return ncclSuccess;
}
ncclResult_t ncclGroupStart(void) { depth++; return 0; }
ncclResult_t ncclGroupEnd(void) {
    ncclResult_t error = ncclSuccess;
    if (--depth) return error;
    for (int i = 0; i < num_waiting && !error; i++) error = receive(waiting[i]);
    num_waiting = 0;
    return error;
}
