// Reductions of the null GPU's NCCL: sums, products and extremes of all ranks' numbers.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include "communicators.h"

const size_t type_sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // of ncclInt8 … ncclFloat8e5m2

// 64 bits of a mantissa hold every integer type.
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

static long double combined(int op, long double sum, long double value) {
    switch (op) {
    case ncclProd: return sum * value;
    case ncclMax: return value > sum || value != value ? value : sum;
    case ncclMin: return value < sum || value != value ? value : sum;
    }
    return sum + value;
}

int reduce(ncclComm_t c, size_t offset, void *to) {
    call *calls = c->shared->calls, mine = calls[c->rank];
    size_t bytes = mine.count * type_sizes[mine.type];
    char *theirs = malloc(bytes + 1);
    long double *sum = malloc(mine.count * sizeof *sum + 1);
    int is_read = 1;
    for (int rank = 0; rank < c->size && is_read; rank++) {
        is_read = fetch(c, rank, (const char *)calls[rank].from + offset, theirs, bytes);
        for (size_t i = 0; i < mine.count && is_read; i++) {
            long double value = number(theirs, i, mine.type);
            sum[i] = rank ? combined(mine.op, sum[i], value) : value;
        }
    }
    for (size_t i = 0; i < mine.count && is_read; i++)
        store(to, i, mine.type, mine.op == ncclAvg ? sum[i] / c->size : sum[i]);
    free(theirs);
    free(sum);
    return is_read;
}
