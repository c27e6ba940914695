// What the processes on the null GPUs share: the bytes that each holds of each GPU, and what each waits for. It lies in a
// file that NULL_GPU_SEGMENT names, and is read by segment_records.py, which repeats these declarations. A process that
// ends in any way gives back what it held: its slot is recognized by its pid and the time of its start.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdatomic.h>

#define PROCESSES 128
#define GPUS 16
#define STREAMS 256
#define CALLS 4096
#define WAITS 64
#define MEMBERS 512

enum stream_state { IDLE, RUNNING, BEHIND_STREAM, IN_CALL };
enum wait { NO_WAIT, WAIT_STREAM, WAIT_DEVICE, WAIT_EVENT, WAIT_COPY, WAIT_FREE, WAIT_OPERATOR, WAIT_CREATION, WAIT_KINDS };
enum call_state { UNUSED, QUEUED, STARTED };

typedef struct { int32_t state, behind, gpu, padding; int64_t blocked_ns; } stream_record;
typedef struct {  // a call of NCCL that has not ended; peer is -1 for a collective
    uint64_t comm;
    int64_t number;  // among the calls of its kind, between these two ranks
    int32_t rank, peer, is_send, state, stream, gpu;
} call_record;
typedef struct { uint64_t comm; int32_t kind, stream, rank, thread; } wait_record;  // of a thread of the host
typedef struct { uint64_t comm; int32_t rank, size; } member_record;  // of a communicator

typedef struct {
    _Atomic int32_t pid;
    int32_t padding;
    _Atomic int64_t birth;
    int64_t bytes[GPUS], peak[GPUS];
    int64_t pinned, pinned_peak;
    _Atomic int64_t changes;  // counts calls that were queued, started or ended
    stream_record streams[STREAMS];
    call_record calls[CALLS];
    wait_record waits[WAITS];
    member_record members[MEMBERS];
} process;

int64_t birth_of(int pid);                // 0 when the process has ended, also while nobody has waited for it
process *this_process(void);
int null_gpu_charge(int gpu, int64_t bytes);       // 0 when the GPU has not so much left
int charge_pinned(int64_t bytes);                 // 0 when the host has not so much left for it
void memory_info(int gpu, size_t *left, size_t *total);
int64_t setting(const char *name, int64_t otherwise);  // an environment variable in bytes, or a number
stream_record *new_stream_record(int *id, int gpu);
call_record *new_call_record(void);       // NULL when there are too many
member_record *new_member_record(void);
wait_record *begin_wait(enum wait kind, int stream);
void end_wait(wait_record *record);
const char *beside_segment(char *path, size_t size, const char *suffix);  // NULL without a segment
