// What a process on the null GPU counts, for tests: waits of the host by kind, label and place, and communicators.
#pragma once
#include <stdint.h>
#include "segment.h"

int64_t now_ns(void);
void count_wait(enum wait kind, int64_t ns);
void null_gpu_label(const char *text);   // of what is counted from now on, in all threads
long null_gpu_waits(int kind);           // of the kind so far, or of all kinds for 0
void null_gpu_write_counters(void);      // also when the process ends: NULL_GPU_COUNTERS.<pid>.json

typedef struct { int size; long calls; } communicator_count;
communicator_count *count_communicator(int size);
