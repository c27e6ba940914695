// NCCL of the null GPU. The ranks of a communicator are processes of one machine, or threads with a GPU each; they share
// a `board` and read each other's memory.
#pragma once
#include "counters.h"
#include "nccl_types.h"
#include "streams.h"

#define RANKS 64        // of a communicator, at most
#define MESSAGES 64     // sent and not yet received, between two ranks
#define LOOK_MS 100     // how often a wait looks whether a peer has ended

enum call_kind { ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, GATHER, SCATTER, SEND, RECEIVE };
typedef struct { int32_t kind, type, op, root; size_t count; const void *from; } call;
typedef struct { const void *start; size_t size; } message;
typedef struct { _Atomic long sent, received; message messages[MESSAGES]; } mailbox;
typedef struct { _Atomic int32_t pid, has_left; int64_t birth; int32_t gpu; } member;  // pid: written last
typedef struct { int color, key; } split;
typedef struct {
    _Atomic uint32_t turn;             // raised, and waited for, at every change
    _Atomic int32_t is_refused;        // ranks disagree: calls wait until they are aborted
    _Atomic long arrived;
    member members[RANKS];
    _Atomic long called[RANKS], read[RANKS];       // collectives
    call calls[RANKS];
    _Atomic long splitting[RANKS], split_read[RANKS];
    split splits[RANKS];
    mailbox from_to[RANKS][RANKS];
} board;

struct ncclComm {
    board *shared;
    int size, rank, device, gpu, num_splits;
    uint64_t id;
    _Atomic int aborted, error, state, references;
    long issued, finished;             // kernels, under the lock of the queues
    int is_running;                    // one of them
    stream *last;                      // on which the last one was queued
    long collectives, to[RANKS], from[RANKS];      // issued so far
    void *buffers[RANKS][MESSAGES];    // of sends that have ended before they were received
    int64_t charged;
    member_record *shown;
    communicator_count *count;
};

extern const size_t type_sizes[];
void board_changed(board *shared);
void await_board(board *shared, uint32_t seen);    // returns after LOOK_MS at the latest
ncclResult_t refuse(ncclComm_t c, const char *what);
int has_ended(ncclComm_t c, int rank);
void release_communicator(ncclComm_t c);
int fetch(ncclComm_t c, int rank, const void *theirs, void *mine, size_t size);  // 0 when that process has ended
int reduce(ncclComm_t c, size_t offset, void *to); // the current collective's calls, from `offset` on
