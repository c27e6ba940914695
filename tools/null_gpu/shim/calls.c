// Calls of the null GPU's NCCL. A call, or a group of calls on one communicator, is a kernel: it takes its turn in its
// stream and blocks that stream until all of it is done. A send is done when the peer's receive has run, or when a buffer
// of NCCL took it (NULL_GPU_NCCL_BUFFERED of them for each peer); a collective when all ranks have run it.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "communicators.h"
#include "counters.h"

enum progress { NEW, PUBLISHED, READ, DONE };
typedef struct {
    call call;
    void *to;
    int peer;
    long number;  // among the collectives, or the messages between these two
    enum progress progress;
    char *made;   // the result of a collective, until all have read
    size_t size;  // of it
    call_record *record;
} task;
typedef struct kernel {
    op base;
    ncclComm_t comm;
    long number;
    stream *after;  // on which the kernel before it on this communicator is queued
    int num_tasks;
    task *tasks;
} kernel;

static size_t bytes_of(call *c) { return c->count * type_sizes[c->type]; }

static void advance_send(ncclComm_t c, task *t, int buffers) {
    mailbox *box = &c->shared->from_to[c->rank][t->peer];
    long room = buffers ? buffers : MESSAGES;
    size_t size = bytes_of(&t->call);
    if (t->progress == NEW && box->sent == t->number && t->number - box->received < room) {
        const void *start = t->call.from;
        if (buffers) {
            void **buffer = &c->buffers[t->peer][t->number % MESSAGES];
            free(*buffer);
            start = *buffer = memcpy(malloc(size + 1), start, size);
        }
        box->messages[t->number % MESSAGES] = (message){start, size};
        box->sent = t->number + 1;
        t->progress = buffers ? DONE : PUBLISHED;
        board_changed(c->shared);
    }
    if (t->progress == PUBLISHED && box->received > t->number) t->progress = DONE;
}

static void advance_receive(ncclComm_t c, task *t) {
    mailbox *box = &c->shared->from_to[t->peer][c->rank];
    if (box->received != t->number || box->sent <= t->number || c->shared->is_refused) return;
    message *found = &box->messages[t->number % MESSAGES];
    if (found->size != bytes_of(&t->call)) {
        refuse(c, "a message of another size than what is received");
    } else if (fetch(c, t->peer, found->start, t->to, found->size)) {
        t->progress = DONE;
        box->received = t->number + 1;
        board_changed(c->shared);
    }
}

static int have_all(ncclComm_t c, _Atomic long *counters, long number) {
    for (int rank = 0; rank < c->size; rank++)
        if (counters[rank] < number) return 0;
    return 1;
}

// Reads what this rank needs of the others'; 0 when one of them has ended.
static int read_others(ncclComm_t c, task *t) {
    call *calls = c->shared->calls, mine = t->call;
    size_t each = bytes_of(&mine);
    int gathers = mine.kind == ALL_GATHER || mine.kind == ALL_TO_ALL || mine.kind == GATHER, is_read = 1;
    free(t->made);
    t->made = 0;
    t->size = 0;
    if ((mine.kind == REDUCE || mine.kind == GATHER) && mine.root != c->rank) return 1;
    t->size = gathers ? each * c->size : each;
    t->made = malloc(t->size + 1);
    for (int rank = 0; rank < c->size && gathers && is_read; rank++) {
        size_t offset = mine.kind == ALL_TO_ALL ? c->rank * each : 0;
        is_read = fetch(c, rank, (const char *)calls[rank].from + offset, t->made + rank * each, each);
    }
    if (gathers) return is_read;
    if (mine.kind == BROADCAST) return fetch(c, mine.root, calls[mine.root].from, t->made, each);
    if (mine.kind == SCATTER)
        return fetch(c, mine.root, (const char *)calls[mine.root].from + c->rank * each, t->made, each);
    return reduce(c, mine.kind == REDUCE_SCATTER ? c->rank * each : 0, t->made);
}

static int agrees(call *a, call *b) {
    return a->kind == b->kind && a->count == b->count && a->type == b->type && a->op == b->op && a->root == b->root;
}

static int is_reduction(call *c) { return c->kind == ALL_REDUCE || c->kind == REDUCE || c->kind == REDUCE_SCATTER; }

// Every rank publishes its call when all have read the one before, reads what it needs when all have published, and is
// done when all have read.
static void advance_collective(ncclComm_t c, task *t) {
    board *shared = c->shared;
    if (shared->is_refused) return;
    if (t->progress == NEW && shared->called[c->rank] == t->number && have_all(c, shared->read, t->number)) {
        shared->calls[c->rank] = t->call;
        shared->called[c->rank] = t->number + 1;
        t->progress = PUBLISHED;
        board_changed(shared);
    }
    if (t->progress == PUBLISHED && have_all(c, shared->called, t->number + 1)) {
        if (!agrees(&t->call, &shared->calls[0]))
            refuse(c, "another collective than rank 0's, of another size, type or root");
        else if (is_reduction(&t->call) && (t->call.op > ncclAvg || t->call.type > ncclBfloat16))
            refuse(c, "this reduction is not implemented");
        else if (read_others(c, t)) {
            shared->read[c->rank] = t->number + 1;
            t->progress = READ;
            board_changed(shared);
        }
    }
    if (t->progress == READ && have_all(c, shared->read, t->number + 1)) {
        if (t->size) memcpy(t->to, t->made, t->size);
        t->progress = DONE;
    }
}

static void show_task(task *t, enum call_state state) {
    if (t->record) t->record->state = state;
    if (state == UNUSED) t->record = 0;
}

static int advance(kernel *k, int buffers) {
    int left = 0;
    for (int i = 0; i < k->num_tasks; i++) {
        task *t = &k->tasks[i];
        if (t->progress == DONE) continue;
        if (t->call.kind == SEND) advance_send(k->comm, t, buffers);
        else if (t->call.kind == RECEIVE) advance_receive(k->comm, t);
        else advance_collective(k->comm, t);
        left += t->progress != DONE;
        if (t->progress == DONE) show_task(t, UNUSED);
    }
    return left;
}

static int waits_for(kernel *k, int rank) {
    for (int i = 0; i < k->num_tasks; i++)
        if (k->tasks[i].progress != DONE && (k->tasks[i].peer < 0 || k->tasks[i].peer == rank)) return 1;
    return 0;
}

// A peer that has ended, or has left the communicator, ends no call: NCCL's transports over a network notice it and set
// the communicator's error, those within a node do not (NULL_GPU_SILENT_DEATH=1).
static void look_for_ended_peers(kernel *k) {
    ncclComm_t c = k->comm;
    for (int rank = 0; rank < c->size && !setting("NULL_GPU_SILENT_DEATH", 0); rank++)
        if (rank != c->rank && waits_for(k, rank) && (c->shared->members[rank].has_left || has_ended(c, rank)))
            c->error = ncclRemoteError;
}

static void show(kernel *k, enum call_state state) {
    for (int i = 0; i < k->num_tasks; i++)
        show_task(&k->tasks[i], state);
    this_process()->changes++;
}

static void run_kernel(op *o, stream *s) {
    kernel *k = (kernel *)o;
    ncclComm_t c = k->comm;
    int buffers = setting("NULL_GPU_NCCL_BUFFERED", 0);
    pthread_mutex_lock(&queues);
    while (c->finished < k->number && !c->aborted) wait_behind(s, k->after);
    c->is_running = 1;
    pthread_mutex_unlock(&queues);
    show(k, STARTED);
    s->record->state = IN_CALL;
    while (!c->aborted) {
        uint32_t seen = c->shared->turn;
        if (!advance(k, buffers)) break;
        int64_t start = now_ns();
        await_board(c->shared, seen);
        s->record->blocked_ns += now_ns() - start;
        if (c->shared->turn == seen) look_for_ended_peers(k);
    }
    show(k, UNUSED);
    for (int i = 0; i < k->num_tasks; i++) free(k->tasks[i].made);
    free(k->tasks);
    pthread_mutex_lock(&queues);
    s->record->state = RUNNING;
    c->is_running = 0;
    c->finished++;
    pthread_cond_broadcast(&queues_changed);
    pthread_mutex_unlock(&queues);
    release_communicator(c);
}

// Numbers a call in the order of issue, which is the order in which a communicator runs its calls.
static void number(ncclComm_t c, task *t, stream *s) {
    t->number = t->call.kind == SEND ? c->to[t->peer]++ : t->call.kind == RECEIVE ? c->from[t->peer]++ : c->collectives++;
    t->record = new_call_record();
    if (!t->record) return;
    t->record->comm = c->id;
    t->record->number = t->number;
    t->record->rank = c->rank;
    t->record->peer = t->peer;
    t->record->is_send = t->call.kind == SEND;
    t->record->stream = s->id;
    t->record->gpu = c->gpu;
}

static ncclResult_t launch(ncclComm_t c, stream *s, task *tasks, int num_tasks) {
    if (c->aborted || c->state || !c->shared) {
        free(tasks);
        return ncclInvalidUsage;
    }
    kernel *k = new_op(sizeof *k, run_kernel);
    k->comm = c;
    k->num_tasks = num_tasks;
    k->tasks = tasks;
    c->references++;
    pthread_mutex_lock(&queues);
    for (int i = 0; i < num_tasks; i++) number(c, &tasks[i], s);
    k->number = c->issued++;
    k->after = c->last;
    c->last = s;
    this_process()->changes++;
    enqueue_locked(s, &k->base);
    pthread_mutex_unlock(&queues);
    return ncclSuccess;
}

// A group's calls, in the order of issue: those of one communicator are one kernel on the stream of its first call, which
// waits for the other calls' streams, and they for it.
typedef struct { ncclComm_t comm; stream *stream; task task; } member_call;
static __thread member_call *group;
static __thread int depth, num_calls;

static void follow(stream *later, stream *earlier) {
    cudaEvent_t event;
    cudaEventCreate(&event);
    cudaEventRecord(event, (cudaStream_t)earlier);
    cudaStreamWaitEvent((cudaStream_t)later, event, 0);
    cudaEventDestroy(event);
}

static ncclResult_t launch_group(ncclComm_t c) {
    task *tasks = calloc(num_calls, sizeof *tasks);
    stream *first = 0;
    int n = 0;
    for (int i = 0; i < num_calls; i++) {
        if (group[i].comm != c) continue;
        if (!first) first = group[i].stream;
        else if (group[i].stream != first) follow(first, group[i].stream);
        tasks[n++] = group[i].task;
    }
    ncclResult_t error = launch(c, first, tasks, n);
    for (int i = 0; i < num_calls; i++) {
        if (group[i].comm != c) continue;
        if (!error && group[i].stream != first) follow(group[i].stream, first);
        group[i].comm = 0;
    }
    return error;
}

ncclResult_t ncclGroupStart(void) { depth++; return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) {
    ncclResult_t error = ncclSuccess;
    if (!depth) return ncclInvalidUsage;
    if (--depth) return ncclSuccess;
    for (int i = 0; i < num_calls; i++)
        if (group[i].comm && !error) error = launch_group(group[i].comm);
    num_calls = 0;
    return error;
}

static ncclResult_t issue(ncclComm_t c, cudaStream_t s, task t) {
    if (t.peer >= c->size) return ncclInvalidArgument;
    c->count->calls++;
    group = realloc(group, (num_calls + 1) * sizeof *group);
    group[num_calls++] = (member_call){c, stream_of(s), t};
    if (depth) return ncclSuccess;
    depth = 1;
    return ncclGroupEnd();
}

static ncclResult_t collective(ncclComm_t c, cudaStream_t s, call wanted, void *to) {
    return issue(c, s, (task){.call = wanted, .to = to, .peer = -1});
}

ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    return issue(c, s, (task){.call = {SEND, t, .count = n, .from = from}, .peer = peer});
}
ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    return issue(c, s, (task){.call = {RECEIVE, t, .count = n}, .to = to, .peer = peer});
}
ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s) {
    return collective(c, s, (call){ALL_REDUCE, t, op, 0, n, from}, to);
}
ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, int root,
                        ncclComm_t c, cudaStream_t s) {
    return collective(c, s, (call){REDUCE, t, op, root, n, from}, to);
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t s) {
    return collective(c, s, (call){BROADCAST, t, 0, root, n, from}, to);
}
ncclResult_t ncclBcast(void *at, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
    return ncclBroadcast(at, at, n, t, root, c, s);
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
    return collective(c, s, (call){ALL_GATHER, t, 0, 0, n, from}, to);
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                               cudaStream_t s) {
    return collective(c, s, (call){REDUCE_SCATTER, t, op, 0, n, from}, to);
}
ncclResult_t ncclAlltoAll(const void *from, void *to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
    return collective(c, s, (call){ALL_TO_ALL, t, 0, 0, n, from}, to);
}
ncclResult_t ncclGather(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                        cudaStream_t s) {
    return collective(c, s, (call){GATHER, t, 0, root, n, from}, to);
}
ncclResult_t ncclScatter(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                         cudaStream_t s) {
    return collective(c, s, (call){SCATTER, t, 0, root, n, from}, to);
}
