// Counters of the null GPU: how often and where the host waited for a stream, a device or a copy; its communicators.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "counters.h"

#define ROWS 1024
#define FRAMES 32

static const char *kinds[] = {"none", "stream", "device", "event", "copy", "free", "operator", "creation"};
typedef struct { int kind; char label[64], place[128]; long number; int64_t ns; } row;
static row rows[ROWS];
static int num_rows;
static communicator_count communicators[ROWS + 1];  // the last one: of those that have no row
static int num_communicators;
static char label[64];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000l + t.tv_nsec;
}

void null_gpu_label(const char *text) {
    pthread_mutex_lock(&mutex);
    snprintf(label, sizeof label, "%s", text);
    pthread_mutex_unlock(&mutex);
}

// The outermost function outside Python's interpreter: what Python called, as `THPVariable_item`.
static void find_place(char *place, size_t size) {
    void *frames[FRAMES];
    Dl_info own, found;
    int n = backtrace(frames, FRAMES), has_own = dladdr((void *)find_place, &own);
    snprintf(place, size, "?");
    for (int i = 0; i < n; i++) {
        if (!dladdr(frames[i], &found) || !found.dli_fname) continue;
        if (has_own && found.dli_fbase == own.dli_fbase) continue;
        const char *file = strrchr(found.dli_fname, '/');
        if (strstr(file ? file : found.dli_fname, "python3") || (found.dli_sname && !strncmp(found.dli_sname, "Py", 2)))
            break;
        if (found.dli_sname) snprintf(place, size, "%s", found.dli_sname);
    }
}

void count_wait(enum wait kind, int64_t ns) {
    char place[sizeof rows->place];
    find_place(place, sizeof place);
    pthread_mutex_lock(&mutex);
    row *at = rows, *end = rows + num_rows;
    while (at < end && (at->kind != (int)kind || strcmp(at->label, label) || strcmp(at->place, place))) at++;
    if (at == end && num_rows < ROWS) {
        *at = (row){.kind = kind};
        strcpy(at->label, label);
        strcpy(at->place, place);
        num_rows++;
    } else if (at == end) at--;
    at->number++;
    at->ns += ns;
    pthread_mutex_unlock(&mutex);
}

long null_gpu_waits(int kind) {
    long number = 0;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < num_rows; i++)
        if (!kind || rows[i].kind == kind) number += rows[i].number;
    pthread_mutex_unlock(&mutex);
    return number;
}

communicator_count *count_communicator(int size) {
    pthread_mutex_lock(&mutex);
    communicator_count *made = communicators + num_communicators;
    if (num_communicators < ROWS) num_communicators++;
    *made = (communicator_count){size, 0};
    pthread_mutex_unlock(&mutex);
    return made;
}

static void write_text(FILE *out, const char *text) {  // of JSON
    fputc('"', out);
    for (; *text; text++)
        if (*text == '"' || *text == '\\' || (unsigned char)*text < ' ') fprintf(out, "\\u%04x", *text);
        else fputc(*text, out);
    fputc('"', out);
}

static void write_integers(FILE *out, const char *name, const int64_t *values) {
    fprintf(out, "\"%s\": [", name);
    for (int gpu = 0; gpu < GPUS; gpu++) fprintf(out, "%s%ld", gpu ? ", " : "", (long)values[gpu]);
    fprintf(out, "],\n ");
}

__attribute__((destructor)) void null_gpu_write_counters(void) {
    const char *prefix = getenv("NULL_GPU_COUNTERS");
    char path[4096];
    if (!prefix || !num_rows) return;  // it has not waited once: it used no GPU
    snprintf(path, sizeof path, "%s.%d.json", prefix, getpid());
    FILE *out = fopen(path, "w");
    if (!out) return;
    process *p = this_process();
    fprintf(out, "{\"pid\": %d,\n ", getpid());
    write_integers(out, "bytes", p->bytes);
    write_integers(out, "peak_bytes", p->peak);
    fprintf(out, "\"pinned_peak_bytes\": %ld,\n \"blocked_seconds\": [", (long)p->pinned_peak);
    const char *comma = "";
    for (int i = 0; i < STREAMS; i++) {
        if (!p->streams[i].blocked_ns) continue;
        fprintf(out, "%s{\"stream\": %d, \"gpu\": %d, \"seconds\": %.6f}", comma, i, p->streams[i].gpu,
                p->streams[i].blocked_ns / 1e9);
        comma = ", ";
    }
    fprintf(out, "],\n \"waits\": [");
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < num_rows; i++) {
        fprintf(out, "%s\n  {\"kind\": \"%s\", \"label\": ", i ? "," : "", kinds[rows[i].kind]);
        write_text(out, rows[i].label);
        fprintf(out, ", \"place\": ");
        write_text(out, rows[i].place);
        fprintf(out, ", \"number\": %ld, \"seconds\": %.6f}", rows[i].number, rows[i].ns / 1e9);
    }
    fprintf(out, "],\n \"communicators\": [");
    for (int i = 0; i < num_communicators; i++)
        fprintf(out, "%s{\"size\": %d, \"calls\": %ld}", i ? ", " : "", communicators[i].size, communicators[i].calls);
    pthread_mutex_unlock(&mutex);
    fprintf(out, "]}\n");
    fclose(out);
}
